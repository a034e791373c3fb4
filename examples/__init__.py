"""To read and to copy: the paper in one file, one step with all its numbers, a task, and the credit in other trainers.

What is for copying (trl_rhythm.py, verl_rhythm.py) imports the algorithm alone and, to have something to train on,
tasks, rollout and eval. step.py and bench.py look at training itself, so they import train and node/ too. Nothing
imports examples/ but the tests.
"""
