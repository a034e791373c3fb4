"""The credit in other people's trainers: a TRL trainer that runs, and README.md for the rest.

May import the algorithm (heads, metrics, credit, grpo) and, to have something to train on, tasks, rollout and eval.
Nothing imports it but lab/bench.py and the tests.
"""
