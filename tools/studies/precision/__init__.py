"""The precision study: damage of quantized forms on trained models, beside other quantizers."""
