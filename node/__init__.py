"""Long runs on real machines: what train.py needs and the algorithm does not.

ranks (several processes), run (folder, log, order of problems, stopping), prepare (arguments, data and model, checked
before anything long), checkpoint (loading, saving and resuming in shares), reload (has the sampler the trainer's
weights?), memory (by formula), check (is this machine ready?), replay (given rollouts on any number of ranks), output
(files and tables), paper.sh (the paper's settings). Imports the modules at the top and tasks/.
"""
