"""The laboratory: is the paper right? README.md has the answer. Nothing outside imports it."""
