"""What tests/test_distributed.py starts under torchrun: train_cifar.py, observed from every process.

    python -m torch.distributed.run --nproc-per-node=2 distributed_job.py MODE FOLDER FLAG ...

MODE: "observe" saves each process's weights and buffers after every epoch into FOLDER; "norm-free" does so for a net
without batch norm; "die" kills process 1 in its fifth step; "terminate" only asks it to end, and asks as seldom as
on GPUs whether anyone was; "overtaken" has last.pt replaced by FOLDER's newer.pt as the last thing before process 0
locks the run's directory, and saves the step from which each process would go on; "traced" lets torch.compile trace and
differentiate but not fuse, so that its results are eager's to the bit; "half-compiled" has no compiler in process 1.
"""

import functools
import os
import pathlib
import signal
import sys
import time

import torch
import torch.nn as nn

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

import data  # noqa: E402
import models  # noqa: E402
import runtime  # noqa: E402
import train_cifar  # noqa: E402


def norm_free(name, num_classes):
    return nn.Sequential(nn.Conv2d(3, 8, 5, stride=4), nn.Tanh(), nn.Flatten(), nn.Linear(392, num_classes))


def main(mode, folder, *argv):
    torch.set_num_threads(1)
    validate, augment, run_lock, steps = train_cifar.validate, data.augment, runtime.run_lock, []

    def observed(model, *args):
        rank, _ = runtime.rank_and_world()
        epoch = len(list(pathlib.Path(folder).glob(f"rank{rank}-*.pt")))
        torch.save(model.state_dict(), f"{folder}/rank{rank}-{epoch}.pt")
        return validate(model, *args)

    def deadly(*args):
        steps.append(1)
        if len(steps) == 5 and runtime.rank_and_world()[0] == 1:
            os.kill(os.getpid(), signal.SIGKILL if mode == "die" else signal.SIGTERM)
        return augment(*args)

    def overtaken(out_dir):
        time.sleep(1)  # the other process must wait, not only be slower
        os.replace(f"{folder}/newer.pt", pathlib.Path(out_dir, "last.pt"))
        return run_lock(out_dir)

    def note_step(args, state, *_):
        pathlib.Path(f"{folder}/step{runtime.rank_and_world()[0]}").write_text(str(state["step"]))
        return True

    train_cifar.validate = observed
    if mode == "norm-free":
        models.build_model = norm_free
    if mode in ("traced", "half-compiled"):
        torch.compile = functools.partial(torch.compile, backend="aot_eager")
        runtime.COMPILE_PAYS_MINUTES = {"cpu": 0}
    if mode == "half-compiled" and os.environ["RANK"] == "1":
        torch.compile = None
    if mode in ("die", "terminate"):
        data.augment = deadly
    if mode == "terminate":
        train_cifar.READ_EVERY["cpu"] = train_cifar.READ_EVERY["cuda"]
    if mode == "overtaken":
        runtime.run_lock, train_cifar.train = overtaken, note_step
    train_cifar.main(list(argv))


if __name__ == "__main__":
    main(*sys.argv[1:])
