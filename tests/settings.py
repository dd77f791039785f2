"""Settings under which every registered method is held to the laws on small layers."""

import lora_lite as ll

# Tests declare methods of their own; these are the library's.
BUILT_IN = ll.variants()

SMALL = {
    "adalora": [{}, dict(init_r=4, target_r=1, alpha=3.0, tinit=1, tfinal=2, delta_t=2)],
    "oft": [dict(block_size=8), dict(n_blocks=2, exact=True), dict(block_size=4, block_share=True)],
    "antipasto": [dict(r=16), dict(r=8, coeff=0.5, suppress_only=True, svd="randomised")],
    "antipasto_rot": [
        dict(r=16),
        dict(r=8, rotate_basis="both", delta_init_mean=0.0, delta_init_std=0.0),
        dict(r=8, rotate_basis="U", block_size=2),
        dict(r=8, rotate_basis="none"),
    ],
    "dplr": [dict(r=16), dict(r=8, lora_rank=2, coeff=0.5, suppress_only=True)],
    "lora": [{}, dict(r=4, alpha=4.0)],
    "pissa": [{}, dict(r=4, svd="randomised")],
    "jora": [
        {},
        dict(core="block", rotation_param="angle", magnitude="ecd_tanh"),
        dict(core="lowrank", magnitude="none", single_sided="left", max_angle=0.5),
        dict(zero_init_core=False, magnitude_on="delta", single_sided="right"),
        dict(S_L=0, S_R=0),
        dict(clip="tanh", magnitude="none"),
        dict(selection="random", warmup_ratio=0.5, k=4),
        dict(selection="none", ecd_temp_annealing=True),
        dict(t_stat=1, pairing_strategy="high_low", use_gumbel=True),
        dict(warmup_steps=2, pairs_freeze_after_warmup=True, ema_beta=0.5),
    ],
}
SQUARE = {
    "jora": [
        dict(core="selective", magnitude="none", selection="random", theta_init_std=0.0, k=4),
        dict(core="coupled", magnitude="none", selection="random", k=4),
    ]
}

RECTANGULAR = ((24, 40), (40, 24))


def cases():
    """(name, hyperparameters, layer sizes) for every registered method."""
    for name in BUILT_IN:
        for hyperparameters in SMALL.get(name, [{}]):
            yield name, hyperparameters, RECTANGULAR
        for hyperparameters in SQUARE.get(name, []):
            yield name, hyperparameters, ((24, 24), (24, 24))
