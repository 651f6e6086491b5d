"""A run's directory: one process at a time, checkpoints of which one is always whole, the log and its curves."""

import contextlib
import csv
import fcntl
import io
import json
import os
import pathlib
import shutil
import signal

import torch

import checkpoints
import losses
import models


@contextlib.contextmanager
def run_lock(out_dir):
    """One process at a time in a run's directory, which is made; ValueError if a living one is there. The kernel frees
    the lock of a process that dies, however it dies."""
    pathlib.Path(out_dir).mkdir(parents=True, exist_ok=True)
    with open(pathlib.Path(out_dir, ".lock"), "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"--out-dir {out_dir}: another process is training there") from None
        except OSError as error:  # some network file systems
            print(f"{out_dir} cannot be locked ({error}): do not start a second process there")
        yield


@contextlib.contextmanager
def deferred_signals():
    """Inside, a first SIGINT or SIGTERM only appends its number to the list that this yields, so that the step at hand
    can be finished and saved; a second one ends the process at once."""
    received = []

    def note(number, frame):
        if received:
            raise KeyboardInterrupt
        received.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def save_run(state, out_dir):
    """Save last.pt; the one before it stays as last.prev.pt."""
    last = pathlib.Path(out_dir, "last.pt")
    if last.exists():
        # a hard link and not a rename: last.pt is there at any moment
        link = last.with_name(".last.prev.tmp")
        link.unlink(missing_ok=True)
        try:
            os.link(last, link)
        except OSError:  # exFAT, mounted drives
            shutil.copyfile(last, link)
        os.replace(link, last.with_name("last.prev.pt"))
        link.unlink(missing_ok=True)  # it stays where both names were one file already, after a failed save
    checkpoints.save(state, last)


def begin(out_dir, resumed, first):
    """Write args.json, and save the state `first` of a new run. Of a resumed one, put last.prev.pt in the place of a
    last.pt that load_run found damaged, and say so: the next save would put that one over the only whole checkpoint."""
    checkpoints.write_atomically(pathlib.Path(out_dir, "args.json"), json.dumps(first["args"], indent=2).encode())
    if resumed is None:
        save_run(first, out_dir)
    elif resumed["damage"]:
        print(f"{resumed['damage']}; going on from the checkpoint before it, last.prev.pt")
        os.replace(pathlib.Path(out_dir, "last.prev.pt"), pathlib.Path(out_dir, "last.pt"))


def there(out_dir):
    """What a failed run leaves to go on from, in words."""
    names = [str(path) for name in ("last.pt", "last.prev.pt") if (path := pathlib.Path(out_dir, name)).exists()]
    return f"the last checkpoints are {' and '.join(names)}" if names else "no checkpoint was written yet"


def load_run(out_dir):
    """The newest whole checkpoint of a run, last.pt or else last.prev.pt (then "damage" says why, else None); raises
    ValueError if there is none."""
    folder = pathlib.Path(out_dir)
    if not (folder / "last.pt").exists() and not (folder / "last.prev.pt").exists():
        raise ValueError(f"--resume: {out_dir} holds no run (no last.pt)")
    damage = None
    try:
        state = checkpoints.load(folder / "last.pt")
    except ValueError as error:
        damage, state = str(error), checkpoints.load(folder / "last.prev.pt")
    if not isinstance(state, dict) or state.get("format") != checkpoints.FORMAT:
        raise ValueError(f"--resume: {out_dir}/last.pt is not a checkpoint of train_cifar.py")
    needed = ("args", "state_dict", "optimizer", "step", "rows", "best", "sums", "on")
    if missing := [key for key in needed if state.get(key) is None]:
        raise ValueError(f"--resume: {out_dir}/last.pt holds no {missing[0]}: a best.pt, or of an older version")
    return state | {"damage": damage}


def write_log(out_dir, rows):
    """log.csv, and curves.png drawn from it; rows: a dict an epoch, None for an empty cell."""
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0])
    writer.writeheader()
    writer.writerows({key: f"{v:.6g}" if isinstance(v, float) else v for key, v in row.items()} for row in rows)
    checkpoints.write_atomically(pathlib.Path(out_dir) / "log.csv", text.getvalue().encode())

    from matplotlib.figure import Figure  # here, so that loading a model does not wait for it

    figure = Figure(figsize=(9, 3.2), layout="constrained")
    axes = figure.subplots(1, 2)
    epochs = [row["epoch"] for row in rows]
    for ax, unit, scale, names in (
        (axes[0], "accuracy (%)", 100, [f"{part}_{kind}_accuracy" for part in ("train", "val")
                                        for kind in ("natural", "robust")]),
        (axes[1], "loss", 1, ["train_loss", "val_natural_loss", "val_robust_loss"]),
    ):
        for name in names:
            values = [row[name] for row in rows]
            if None not in values:
                style = ".--" if name.startswith("train") else ".-"
                label = name.replace("_accuracy", "").replace("_", " ")
                ax.plot(epochs, [scale * v for v in values], style, label=label)
        ax.set(xlabel="epoch", ylabel=unit)
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.grid(alpha=0.3)
        ax.legend(fontsize=8)
    image = io.BytesIO()
    figure.savefig(image, dpi=100)
    checkpoints.write_atomically(pathlib.Path(out_dir) / "curves.png", image.getvalue())


@torch.no_grad()
def shares(model, plain, x, x_adv, y, alpha):
    """For the log, of one batch: (3,) how many of the examples have p_y(x) > 1 - α, where ascending LSCE raises the
    true logit, how many the attack made easier, p_y(x_adv) > p_y(x), and of how many; zeros if alpha is None."""
    if alpha is None:
        return x.new_zeros(3)
    with models.frozen(model):
        before, after = (losses.p_true(plain(batch), y) for batch in (x, x_adv))
    return torch.stack([before > 1 - alpha, after > before, torch.ones_like(y, dtype=torch.bool)]).sum(1).float()


@torch.no_grad()
def tally(loss, logits_nat, logits_adv, y):
    """More of it: (3,) the loss; the natural and the robust training accuracy, 0 without logits."""
    right = [torch.zeros_like(loss) if logits is None else (logits.argmax(1) == y).float().mean()
             for logits in (logits_nat, logits_adv)]
    return torch.stack([loss, *right])


def epoch_row(args, epoch, lr, sums, steps):
    """A row of the log from the epoch's running sums; None, an empty cell, for what the defense does not have."""
    loss, natural, robust, confident, easier, sampled = sums
    row = {"epoch": epoch, "lr": lr, "train_loss": loss / steps}
    row["train_natural_accuracy"] = natural / steps if args.defense != "madry" else None
    row["train_robust_accuracy"] = robust / steps if sampled else None
    has_alpha = sampled and (args.defense != "trades" or args.spat_alpha is not None)
    row["share_p_y_above_1_minus_alpha"] = confident / sampled if has_alpha else None
    row["share_made_easier"] = easier / sampled if sampled else None
    return row


def summary(rows, warm_up, num_classes):
    """The lines on the screen at the end of an epoch. warm_up: after which epoch a robust accuracy that stays at
    guessing is worth a warning; False for never."""
    row = rows[-1]
    parts = [f"epoch {row['epoch']}", f"lr {row['lr']:.4g}", f"loss {row['train_loss']:.4f}"]
    for name in ("natural", "robust"):
        if row[f"val_{name}_accuracy"] is not None:
            parts.append(f"val {name} {row[f'val_{name}_accuracy']:.2%}")
    line = "  ".join(parts + [f"{row['images_per_s']:.0f} img/s"])
    late = [row["val_robust_accuracy"] for row in rows[-3:] if row["epoch"] > warm_up]
    if warm_up is not False and len(late) == 3 and None not in late and max(late) <= 1.05 / num_classes:
        line += "\nwarning: the robust accuracy has been at chance for three epochs: is the learning rate too high?"
    return line
