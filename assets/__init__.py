"""The models that the project is tried on, and how they were made. May import tasks, rollout and node."""
