"""Sample new slices from a trained run, or reconstruct given ones.

python predict.py --run runs/default --num 64                    # new slices to samples/ and images/samples.png
python predict.py --run runs/default --reconstruct FILE_OR_FOLDER --out reconstructions
"""

import csv
import time
from collections.abc import Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from tqdm import tqdm

from dataset import DataError, read_slices, unscale
from metrics import reconstruction_metrics
from modules import VQVAE, GatedPixelCNN, PriorConfig, VQVAEConfig
from utils import (
    LIMITS,
    Parser,
    RunError,
    check_folder,
    fail,
    load_weights,
    number,
    pick_device,
    read_config,
    reconstructions_figure,
    samples_figure,
    spread,
)

SHOWN = 64  # samples in the figure
DIGITS = "[0-9]" * 6  # in the names of files
MOST = 10**6  # samples, so that their numbers have six digits


def parse_options(arguments: Sequence[str] | None):
    """The command line."""
    parser = Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--run", type=Path, default=Path("runs/default"), help="run directory (default: %(default)s)")
    parser.add_argument(
        "--num", type=number(int, 1, MOST), default=64, metavar="N", help="slices to sample (default: 64)"
    )
    parser.add_argument("--out", type=Path, default=Path("samples"), help="folder of slices (default: %(default)s)")
    parser.add_argument("--images", type=Path, default=Path("images"), help="folder of figures (default: %(default)s)")
    parser.add_argument(
        "--temperature",
        type=number(float, 0, 100, above=True),
        default=1.0,
        metavar="T",
        help="above 0, at most 100; below 1 the likelier codes are drawn more often (default: 1.0)",
    )
    parser.add_argument(
        "--top-p",
        type=number(float, 0, 1, above=True),
        default=1.0,
        metavar="P",
        help="draw from the fewest codes that have probability P together (default: 1.0, all)",
    )
    parser.add_argument(
        "--position",
        type=number(float, 0, 1),
        metavar="P",
        help="height of the slices in their volume, 0 (lowest) to 1 (default: as often as in the training data)",
    )
    parser.add_argument(
        "--batch-size",
        type=number(int, *LIMITS["batch_size"]),
        default=32,
        metavar="N",
        help="slices at a time (default: 32)",
    )
    parser.add_argument(
        "--seed",
        type=number(int, *LIMITS["seed"]),
        default=0,
        help="of the samples; sample n is fixed by it (default: 0)",
    )
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 ... (default: a GPU where there is one)")
    parser.add_argument(
        "--reconstruct",
        type=Path,
        nargs="+",
        metavar="PATH",
        help="instead of sampling: encode and decode these files, or a folder's",
    )
    return parser.parse_args(arguments)


def prepare_folder(out: Path, patterns: Sequence[str]) -> None:
    """Make the folder; remove what an earlier call wrote there, and say so."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        old = [path for pattern in patterns for path in out.glob(pattern)]
        if old:
            print(f"{out} held {len(old)} files of an earlier call: replaced")
        for path in old:
            path.unlink()
    except OSError as error:
        raise RunError(f"--out {out} cannot be written: {error.strerror}") from None


def write_slice(path: Path, pixels: np.ndarray, affine: np.ndarray) -> None:
    """A slice (H, W) as float32 NIfTI with that affine (4, 4), in mm."""
    image = nib.Nifti1Image(pixels.astype(np.float32), affine)
    image.header.set_xyzt_units("mm")
    nib.save(image, path)


def draw_positions(numbers: Sequence[int], seed: int, described: dict) -> torch.Tensor:
    """Positions (N,) for sample numbers, distributed as the training slices': NaN for not known."""
    draws = np.array([np.random.default_rng((seed, n)).random(2) for n in numbers])
    if described["unknown"] == 1:
        return torch.full((len(draws),), torch.nan)
    quantiles = described["quantiles"]
    positions = np.interp(draws[:, 0], np.linspace(0, 1, len(quantiles)), quantiles)
    positions[draws[:, 1] < described["unknown"]] = np.nan
    return torch.from_numpy(positions).float()


def sample(options, config: dict, vqvae: VQVAE, prior: GatedPixelCNN, device: torch.device) -> None:
    """Draw code grids, decode them, write slices, codes and the sheet."""
    prepare_folder(options.out, (f"sample_{DIGITS}.nii.gz", "codes.npy"))
    rows = prior.config.grid[0]
    codes, slices, seconds = [], [], [0.0, 0.0]
    batches = [range(i, min(i + options.batch_size, options.num)) for i in range(0, options.num, options.batch_size)]
    with tqdm(total=len(batches) * rows, desc="sampling", unit="row", disable=None) as bar:
        for numbers in batches:
            start = time.perf_counter()
            positions = draw_positions(numbers, options.seed, config["positions"])
            if options.position is not None:
                positions = torch.full((len(numbers),), options.position)
            drawn = prior.sample(
                numbers,
                positions.to(device),
                options.seed,
                options.temperature,
                options.top_p,
                progress=lambda row: bar.update(),
            )
            codes.append(drawn.cpu().numpy())
            drawn_at = time.perf_counter()
            slices.append(vqvae.decode(drawn)[:, 0].cpu().numpy())
            seconds[0] += drawn_at - start
            seconds[1] += time.perf_counter() - drawn_at
    slices = np.concatenate(slices)
    np.save(options.out / "codes.npy", np.concatenate(codes).astype(np.int16))
    affine = np.array(config["affine"])
    for i, pixels in enumerate(unscale(slices, config["intensity"]["scale"])):
        write_slice(options.out / f"sample_{i:06d}.nii.gz", pixels, affine)
    shown = min(options.num, SHOWN)
    settings = f"temperature {options.temperature:g}, top-p {options.top_p:g}, seed {options.seed}"
    samples_figure(options.images / "samples.png", slices[:shown], f"{shown} samples, {settings}")
    print(
        f"{options.num} slices in {sum(seconds):.1f} s ({options.num / sum(seconds):.1f} slices/s; codes "
        f"{seconds[0]:.1f} s, decoding {seconds[1]:.1f} s): {options.out}, {options.images / 'samples.png'}"
    )


def reconstruct(options, config: dict, vqvae: VQVAE, device: torch.device) -> None:
    """Encode and decode given slices; write both, a table of SSIM and PSNR, and a figure."""
    slices, affines = read_slices(options.reconstruct, tuple(config["slice_size"]))
    if any(Path(name).resolve().parent == options.out.resolve() for name in slices.names):
        raise RunError(f"--out {options.out} holds the slices to reconstruct: choose another folder")
    prepare_folder(
        options.out, (f"{DIGITS}_*_original.nii.gz", f"{DIGITS}_*_reconstruction.nii.gz", "reconstructions.csv")
    )
    overall = reconstruction_metrics().to(device)
    single = reconstruction_metrics().to(device)
    rows, reconstructions = [], []
    for batch in slices.batches(options.batch_size):
        batch = batch.to(device)
        decoded = vqvae.decode(vqvae.encode(batch))
        overall.update(decoded, batch)
        for pair in zip(decoded.split(1), batch.split(1)):
            figures = {name: value.item() for name, value in single(*pair).items()}
            rows.append({"slice": slices.names[len(rows)]} | figures)
        reconstructions.append(decoded[:, 0].cpu().numpy())
    reconstructions = np.concatenate(reconstructions)
    originals = slices.batch(np.arange(len(slices)))[:, 0].numpy()
    for i, affine in enumerate(affines):
        name = f"{i:06d}_{Path(slices.names[i]).name.removesuffix('.gz').removesuffix('.nii')}"
        for kind, pixels in (("original", originals[i]), ("reconstruction", reconstructions[i])):
            write_slice(options.out / f"{name}_{kind}.nii.gz", unscale(pixels, slices.scales[i]), affine)
    with open(options.out / "reconstructions.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, ("slice", "ssim", "psnr"))
        writer.writeheader()
        writer.writerows(rows)
    chosen = spread(len(slices))
    titles = [f"{Path(slices.names[i]).name.split('.')[0]}\nSSIM {rows[i]['ssim']:.3f}" for i in chosen]
    reconstructions_figure(options.images / "reconstructions.png", originals[chosen], reconstructions[chosen], titles)
    figures = {name: value.item() for name, value in overall.compute().items()}
    print(f"{len(slices)} slices: SSIM {figures['ssim']:.3f}, PSNR {figures['psnr']:.2f} dB: {options.out}")


def check_fit(run: Path, config: dict, vqvae: VQVAE, prior: GatedPixelCNN | None = None) -> None:
    """Raise RunError where a run's networks and config are not of one training."""
    side = vqvae.config.downsampling
    rows, columns = config["slice_size"]
    if rows % side or columns % side:
        raise RunError(f"{run}: vqvae.safetensors takes no slices of {rows}x{columns}, which config.json has")
    if prior and (prior.config.grid, prior.config.codes) != ((rows // side, columns // side), vqvae.config.codes):
        raise RunError(f"{run}: prior.safetensors and vqvae.safetensors are of different runs: their codes differ")


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line `python predict.py`."""
    options = parse_options(arguments)
    device = pick_device(options.device)
    check_folder("--out", options.out)
    check_folder("--images", options.images)
    torch.backends.cudnn.allow_tf32 = False  # on a GPU, too coarse for a sample to be the same at every batch size
    config = read_config(options.run)
    vqvae = load_weights(options.run / "vqvae.safetensors", VQVAE, VQVAEConfig).to(device)
    check_fit(options.run, config, vqvae)
    if options.reconstruct:
        reconstruct(options, config, vqvae, device)
        return
    prior = load_weights(options.run / "prior.safetensors", GatedPixelCNN, PriorConfig).to(device)
    check_fit(options.run, config, vqvae, prior)
    sample(options, config, vqvae, prior, device)


if __name__ == "__main__":
    try:
        main()
    except (DataError, RunError, OSError) as error:
        fail(error)
    except KeyboardInterrupt:
        raise SystemExit(130) from None
