"""A pretrained softmax checkpoint to an attention of hf_expressive; `convert.py` is the command."""
