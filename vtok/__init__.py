"""Visual tokenizers: images to tokens and back."""
