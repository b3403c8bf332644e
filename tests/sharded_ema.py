"""Run on every rank: averages by shards beside averages of the whole weights, and networks that are made of them.

Prints how many elements a rank holds.
"""

import sys
from pathlib import Path

import pytest
import torch
from running import small_config

from scalelong.model.architectures import make_backbone
from scalelong.train.errors import UserError
from scalelong.train.hosts.processes import join_processes, leave_processes
from scalelong.train.zero import engine as zero
from scalelong.train.zero import shards
from scalelong.train.zero.averages import FIXED_DECAY, Ema, Teacher, averaged_network, share_of_newest

stage = int(sys.argv[1])
processes = join_processes()
config = small_config(Path("unused"), zero_stage=stage)
torch.manual_seed(0)
engine = zero.make_engine(make_backbone(config.model), config, processes, micro_batch=4)
ema = Ema(engine, decay=0.9, stds=(0.05, 0.1))
expected = {name: dict(shards.whole_weights(engine)) for name in ema.averages}
expected = {name: {k: v.clone() for k, v in whole.items()} for name, whole in expected.items()}
zero.set_learning_rate(engine, 1e-2)
for step in range(1, 6):
    loss = engine(torch.randn(4, 1, 8, 8), torch.rand(4), torch.arange(4)).square().mean()
    engine.backward(loss)
    zero.take_step(engine)
    ema.update(step)
    weights = dict(shards.whole_weights(engine))
    for name, whole in expected.items():
        share = 1 - 0.9 if name == FIXED_DECAY else share_of_newest(ema.exponents[name], step)
        for key, value in whole.items():
            value.lerp_(weights[key], share)

for name, whole in expected.items():
    gathered = dict(shards.whole_tensors(engine, ema.averages[name]))
    assert gathered.keys() == whole.keys()
    assert all(torch.equal(gathered[key], whole[key]) for key in whole), name
    assert not torch.equal(gathered["pos_embed"], weights["pos_embed"]), "the weights stood still"
    ema.restore(name, gathered)
    restored = dict(shards.whole_tensors(engine, ema.averages[name]))
    assert all(torch.equal(restored[key], whole[key]) for key in whole), name

images, times, labels = torch.randn(4, 1, 8, 8), torch.rand(4), torch.arange(4)
plain = make_backbone(config.model)


def answers_as(network: torch.nn.Module, whole: dict[str, torch.Tensor]) -> bool:
    plain.load_state_dict(whole)
    return torch.equal(network(images, times, labels), plain(images, times, labels))


averaged = averaged_network(ema, lambda: make_backbone(config.model))
assert answers_as(averaged, expected[FIXED_DECAY])
assert not any(p.requires_grad for p in averaged.parameters())
assert not averaged.training
if stage == 3:
    with pytest.raises(UserError, match="take --zero-stage 0, 1 or 2"):
        Teacher(ema, lambda: make_backbone(config.model))
else:
    teacher = Teacher(ema, lambda: make_backbone(config.model))
    if stage == 0:
        addresses = [average.data_ptr() for average in ema.averages[FIXED_DECAY]]
        assert addresses == [p.data_ptr() for p in teacher.network.parameters()], "a second copy"
    engine.backward(engine(images, times, labels).square().mean())
    zero.take_step(engine)
    ema.update(6)
    teacher.follow()
    followed = dict(shards.whole_tensors(engine, ema.averages[FIXED_DECAY]))
    assert not torch.equal(followed["pos_embed"], restored["pos_embed"])
    assert answers_as(teacher.network, followed)
    ema.restore(FIXED_DECAY, expected[FIXED_DECAY])
    teacher.follow()
    assert answers_as(teacher.network, expected[FIXED_DECAY])

held = [sum(shard.numel() for shard in average) for average in ema.averages.values()]
if processes.is_main:
    print("elements", len(weights), sum(w.numel() for w in weights.values()), *held)
print("held", processes.rank, *held, flush=True)
leave_processes()
