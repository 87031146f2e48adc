"""The model: encoders, their fusion and decoders.

In come prepared batches; out come tokens and latents.
"""
