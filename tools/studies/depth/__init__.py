"""Studies of depth: what dropping, replacing and repairing branches costs in quality."""
