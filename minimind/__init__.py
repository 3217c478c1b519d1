"""MiniMind: train a small Chinese/English chat language model from zero."""
