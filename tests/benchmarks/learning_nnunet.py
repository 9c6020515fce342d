"""nnU-Net 2-D, cut to given minutes; run by `learning.py` in an environment with nnunetv2.

    python tests/benchmarks/learning_nnunet.py --arrays FILE.npz --minutes 8 --work DIR

Its own fingerprint, plan, preprocessing, network, augmentation, loss and optimizer, on the training
split as fold `all`. Changed: the loop ends after the minutes, the polynomial decay of the learning
rate follows the time rather than the epoch, nothing is validated in between, and augmentation runs
in one process. Predicted as nnU-Net does, in half-overlapping windows with mirroring.
"""

import argparse
import json
import os
import time
from pathlib import Path

import numpy as np
from PIL import Image

IGNORE = 255
DATASET = "Dataset001_learning"


def write_raw(arrays: np.lib.npyio.NpzFile, folder: Path, classes: int) -> None:
    """Write the training split in nnU-Net's layout."""
    for part in ("imagesTr", "labelsTr"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    count = sum(name.startswith("train-image-") for name in arrays.files)
    ignored = False
    for i in range(count):
        image, mask = arrays[f"train-image-{i}"], arrays[f"train-mask-{i}"].copy()
        ignored |= bool((mask == IGNORE).any())
        mask[mask == IGNORE] = classes
        Image.fromarray(image.squeeze()).save(folder / "imagesTr" / f"case{i:04d}_0000.png")
        Image.fromarray(mask).save(folder / "labelsTr" / f"case{i:04d}.png")
    channels = arrays["train-image-0"].shape[2]
    labels = {"background": 0, **{f"class{c}": c for c in range(1, classes)}}
    labels |= {"ignore": classes} if ignored else {}
    plain = {
        "channel_names": {str(c): "RGB"[c] for c in range(channels)},
        "labels": labels,
        "numTraining": count,
        "file_ending": ".png",
        "overwrite_image_reader_writer": "NaturalImage2DIO",
    }
    (folder / "dataset.json").write_text(json.dumps(plain))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arrays", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--split", default="val")
    parser.add_argument("--classes", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, required=True)
    arguments = parser.parse_args()
    places = {"raw": "nnUNet_raw", "pre": "nnUNet_preprocessed", "out": "nnUNet_results"}
    for name, variable in places.items():
        os.environ[variable] = str((arguments.work / name).resolve())
    os.environ |= {"nnUNet_n_proc_DA": "1", "nnUNet_compile": "false"}
    arrays = np.load(arguments.arrays)
    write_raw(arrays, arguments.work / "raw" / DATASET, arguments.classes)

    import torch
    from nnunetv2.experiment_planning.plan_and_preprocess_api import (
        extract_fingerprints,
        plan_experiments,
        preprocess,
    )
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    class TimedTrainer(nnUNetTrainer):
        steps = 0

        def run_training(self) -> None:
            self.on_train_start()
            self.network.train()
            start = time.monotonic()
            while (done := (time.monotonic() - start) / (60 * arguments.minutes)) < 1:
                self.optimizer.param_groups[0]["lr"] = self.initial_lr * (1 - done) ** 0.9
                self.train_step(next(self.dataloader_train))
                self.steps += 1

    torch.manual_seed(arguments.seed)
    np.random.seed(arguments.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    extract_fingerprints([1], num_processes=1)
    plan_experiments([1])
    preprocess([1], configurations=("2d",), num_processes=(1,))
    planned = arguments.work / "pre" / DATASET
    plans, dataset = (
        json.loads((planned / name).read_text()) for name in ("nnUNetPlans.json", "dataset.json")
    )
    trainer = TimedTrainer({**plans, "continue_training": False}, "2d", "all", dataset, device)
    trainer.initialize()
    trainer.run_training()

    predictor = nnUNetPredictor(device=device, perform_everything_on_device=device.type == "cuda")
    trainer.set_deep_supervision_enabled(False)
    trainer.network.eval()
    predictor.manual_initialization(
        trainer.network,
        trainer.plans_manager,
        trainer.configuration_manager,
        None,
        dataset,
        "nnUNetTrainer",
        trainer.inference_allowed_mirroring_axes,
    )
    predictor.list_of_parameters = [trainer.network.state_dict()]
    sums = np.zeros((arguments.classes, arguments.classes), np.int64)
    for i in range(sum(name.startswith(f"{arguments.split}-image-") for name in arrays.files)):
        image, mask = (arrays[f"{arguments.split}-{kind}-{i}"] for kind in ("image", "mask"))
        planes = image.transpose(2, 0, 1)[:, None].astype(np.float32)
        predicted = predictor.predict_single_npy_array(planes, {"spacing": (999, 1, 1)})[0]
        valid = mask != IGNORE
        np.add.at(sums, (mask[valid], predicted[valid].astype(int)), 1)
    print(json.dumps({"steps": trainer.steps, "confusion": sums.tolist()}))


if __name__ == "__main__":
    main()
