"""Label unlabelled images with a model: the pseudo-labels that RST trains on.

    python pseudo_label.py --model-path runs/NAME/best.pt --images IN --output OUT.npz

IN: an .npz or a pickle with the array `data` (uint8, N x 32 x 32 x 3 or N x 3 x 32 x 32), or a folder of images of one
size. OUT.npz: `data` as it was and `extrapolated_targets`, for train_cifar.py --aux-data. Where no images of one's own
are at hand: --dataset cifar10 --skip 10000 labels the training images that --limit-train 10000 leaves out.
"""

import pathlib
import sys

import numpy as np
import torch
from tqdm import tqdm

import checkpoints
import data
import eval_attacks
import models
import runtime


def parse_args(argv=None):
    parser = runtime.Parser(prog="pseudo_label.py", description=__doc__)
    add = parser.add_argument
    add("--model-path", required=True, metavar="FILE", help="the model that labels")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--images", metavar="IN", help="the unlabelled images")
    source.add_argument("--dataset", help="in their place the training images of this data set, without their labels")
    add("--skip", type=runtime.natural_int, default=0, metavar="N", help="... but for its first N (default: 0)")
    add("--data-dir", default="data", metavar="DIR", help="where CIFAR is, or is downloaded to (default: data)")
    add("--output", required=True, metavar="OUT.npz", help="where to write; must not exist")
    add("--normalize", nargs=2, type=runtime.three_numbers, metavar=("MEAN", "STD"),
        help="of a released model that was trained on normalised images (default: none)")
    add("--batch-size", type=runtime.positive_int, default=512, help="(default: 512)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: auto)")
    return parser, parser.parse_args(argv)


def read_images(path):
    """The array `data` of a file, or the images of a folder, in the order of their names; uint8. Raises ValueError."""
    if not path.is_dir():
        arrays = checkpoints.load_arrays(path, ["data"])
        data.as_images(path, arrays)  # its checks
        return arrays["data"]
    files = sorted(file for file in path.iterdir() if file.suffix.lower() in data.IMAGE_SUFFIXES)
    if not files:
        raise ValueError(f"{path} holds no images ({', '.join(data.IMAGE_SUFFIXES)})")
    return data.read_image_files(files)


def training_images(args):
    """(the array `data`, the true labels) of --dataset but for the first --skip; raises ValueError."""
    dataset = data.load(args.dataset, args.data_dir)
    if args.skip >= len(dataset.labels):
        raise ValueError(f"--skip {args.skip} leaves none of the {len(dataset.labels)} images of {args.dataset}")
    rest = dataset.subset(slice(args.skip, None))
    return rest.images.permute(0, 2, 3, 1).numpy(), rest.labels


def main(argv=None):
    parser, args = parse_args(argv)
    output = pathlib.Path(args.output)
    try:
        if output.exists():
            raise ValueError(f"--output {output} exists already")
        if output.suffix != ".npz":
            raise ValueError(f"--output {output} must end in .npz")
        runtime.check_output("--output", output)
        device = runtime.pick_device(args.device)
        model, info = checkpoints.load_model(args.model_path, normalize=args.normalize)
        pixels, true = training_images(args) if args.dataset else (read_images(pathlib.Path(args.images)), None)
        arrays = {"data": pixels}
        images = data.as_images(args.images or args.dataset, arrays)
    except (ValueError, OSError) as error:
        parser.error(error)
    try:
        model = model.to(device)
        labels = torch.empty(len(images), dtype=torch.long)
        with models.frozen(model), tqdm(total=len(images), unit="img", unit_scale=True, dynamic_ncols=True) as bar:
            for positions in torch.arange(len(images)).split(args.batch_size * 16):  # so that few are float at a time
                logits = eval_attacks.attacked_logits(model, images[positions].to(device), labels[positions].to(device),
                                                 batch_size=args.batch_size, progress=bar.update)
                labels[positions] = logits.argmax(1).cpu()
        arrays["extrapolated_targets"] = labels.numpy()
        checkpoints.write_atomically(output, lambda file: np.savez(file, **arrays))
    except runtime.FAULTS as error:
        sys.exit(f"{parser.prog}: {error}")
    counts = torch.bincount(labels, minlength=info["num_classes"]).tolist()
    right = "" if true is None else f"; {(labels == true).float().mean():.2%} of the labels are right"
    print(f"{output}: {len(images)} images; images a class: {counts}{right}")


if __name__ == "__main__":
    main()
