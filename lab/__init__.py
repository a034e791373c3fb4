"""The laboratory: is the paper right, what does it cost, how was the tiny model made? Results: README.md.

Run as modules: python -m lab.analyze. Imports everything else; nothing else imports it.
"""
