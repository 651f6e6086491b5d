"""Label unlabelled images by a model: the pseudo-labels that RST trains on.

    python pseudo_label.py --model-path runs/NAME/best.pt --images IN --output OUT.npz

IN: an .npz or a pickle with the array `data` (uint8, N x 32 x 32 x 3 or N x 3 x 32 x 32), or a folder of images of one
size. OUT.npz: `data` as it was and `extrapolated_targets`, for train_cifar.py --aux-data. Without images of one's own:
--dataset cifar10 --skip 10000 labels the training images that --limit-train 10000 --val-size 0 leaves out.
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
    add("--skip", type=runtime.natural_int, default=0, metavar="N", help="... but for its first N")
    add("--data-dir", default="data", metavar="DIR", help="where CIFAR is, or is downloaded to")
    add("--output", required=True, metavar="OUT.npz", help="where to write; must not exist")
    eval_attacks.add_file_flags(add)
    add("--batch-size", type=runtime.positive_int, default=512, help="images at a time")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: the GPU, if there is one")
    return parser, parser.parse_args(argv)


def main(argv=None):
    parser, args = parse_args(argv)
    output, source = pathlib.Path(args.output), args.images or args.dataset
    try:
        if output.exists() or output.suffix != ".npz":
            raise ValueError(f"--output {output} must end in .npz and not exist yet")
        runtime.check_output("--output", output)
        device = runtime.pick_device(args.device)
        model, info = checkpoints.load_model(args.model_path, arch=args.arch, normalize=args.normalize,
                                             weights=args.weights)
        if args.images and args.skip:
            raise ValueError("--skip goes with --dataset")
        pixels, true = training_images(args, info) if args.dataset else (read_images(pathlib.Path(args.images)), None)
        images = data.as_images(source, {"data": pixels})
        data.check_size(images, source, info)
        eval_attacks.say_notes(model, info, device, images, true)
    except (ValueError, FloatingPointError, *runtime.FAULTS) as error:
        parser.error(error)
    try:
        model, images = model.to(device), images.to(device)
        with models.frozen(model), tqdm(total=len(images), unit="img", unit_scale=True, dynamic_ncols=True) as bar:
            logits = eval_attacks.attacked_logits(model, images, None, batch_size=args.batch_size, progress=bar.update)
        labels = logits.argmax(1).cpu()
        arrays = {"data": pixels, "extrapolated_targets": labels.numpy()}
        if info.get("classes"):  # a file of another project does not say
            arrays["classes"] = np.array(info["classes"])
        checkpoints.write_atomically(output, lambda file: np.savez(file, **arrays))
    except (FloatingPointError, *runtime.FAULTS) as error:
        sys.exit(f"{parser.prog}: {error}")
    counts = torch.bincount(labels, minlength=info["num_classes"]).tolist()
    right = "" if true is None else f"; {(labels == true).float().mean():.2%} of the labels are right"
    print(f"{output}: {len(images)} images; images a class: {counts}{right}")


def training_images(args, info):
    """Return the array `data` and the true labels of --dataset without its first --skip. Raise ValueError, also where
    its classes are not the model's; info: of checkpoints.load_model."""
    dataset = data.fitted(data.load(args.dataset, args.data_dir), args.dataset, info)
    if args.skip >= len(dataset.labels):
        raise ValueError(f"--skip {args.skip} leaves none of the {len(dataset.labels)} images of {args.dataset}")
    return dataset.images[args.skip:].permute(0, 2, 3, 1).numpy(), dataset.labels[args.skip:]


def read_images(path):
    """Return the array `data` of a file, or the images of a folder in the order of their names. Raise ValueError."""
    if not path.is_dir():
        return checkpoints.load_arrays(path, ["data"])["data"]
    entries = sorted(path.iterdir())
    files = [file for file in entries if file.suffix.lower() in data.IMAGE_SUFFIXES]
    if not files:
        raise ValueError(f"{path} holds no images ({', '.join(data.IMAGE_SUFFIXES)})")
    if others := len(entries) - len(files):
        print(f"{path}: {others} other files and folders are left out", file=sys.stderr)
    return data.read_image_files(files)


if __name__ == "__main__":
    main()
