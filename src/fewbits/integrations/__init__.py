"""Inside other people's code: a quantizer for transformers' `from_pretrained`, and torch modules quantized in place."""
