"""The log itself as a Generator: nothing is fitted, and every transition is real.

python pgd.py --synthetic none
"""

import pgd


def make_log_alone(config: pgd.Config) -> pgd.Generator:
    """-> a Generator of logged transitions; the agent's batches should be all real (real_batch)."""
    return pgd.Generator(
        init=lambda key, dataset: (),
        fit=lambda key, model, dataset: (model, {}),
        generate=lambda key, model, policy, weight, dataset: dataset.sample(key, config.batch_size),
        validate=lambda model, dataset: {},
    )
