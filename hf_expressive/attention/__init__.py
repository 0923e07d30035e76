"""The mechanisms as modules: one file each, and the contract they share."""
