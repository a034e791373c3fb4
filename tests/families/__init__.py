"""Which kinds of models are scored and reloaded rightly: every one that transformers knows, tiny and random.

programs: python -m tests.families.models, python -m tests.families.reload. They may import all but train and eval.
"""
