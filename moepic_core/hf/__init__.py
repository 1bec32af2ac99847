"""The only importers of transformers: loading, the experts function, the forward pass, text in and out."""
