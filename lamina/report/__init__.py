"""What a person sees: terminal tables now; pages and plots read the same plain data."""
