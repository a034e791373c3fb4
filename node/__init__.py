"""The machine under a long run: what train.py and eval.py need, and the algorithm does not.

    settings      models by name; default arguments that depend on the model; the command line
    prepare       arguments, data and model, checked before anything long starts; the plan of --dry_run
    ranks         several processes: shares, exchange of results, FSDP2
    precision     the type that passes compute in
    run           one run: its folder, its log, the order of problems; when it saves, evaluates and stops
    samples       one group of responses a step, for samples.jsonl
    look          a page of one or several runs: curves and responses
    checkpoint    loading, saving and resuming in shares
    weights       the model's tensors under the names that checkpoints have for them
    reload        the trainer's weights go into vLLM
    stale         does the sampler have the trainer's weights?
    memory        how much memory training takes, by formula
    check         is this machine ready?
    replay        training steps on given rollouts, on any number of ranks
    output        files, tables, intervals
    paper.sh      the paper's settings

May import the algorithm, rollout.py and tasks/. Never train.py, eval.py or lab/; what needs train.py is handed it.
"""
