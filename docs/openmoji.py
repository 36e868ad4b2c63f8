"""Make a folder of coloured pictures with captions from the pictograms of OpenMoji.

    npm pack openmoji && tar xzf openmoji-*.tgz
    python docs/openmoji.py package pictures

OpenMoji (openmoji.org, CC BY-SA 4.0) names every pictogram. Variants of skin tone are left out, and so is a pictogram
whose name another one has. `rsvg-convert` (Debian: librsvg2-bin) draws them, on white.
"""

import json
import subprocess
import sys
from pathlib import Path

from tqdm import tqdm

SIZE = 64  # pixels


def main(package: Path, folder: Path) -> None:
    """Draw the pictograms, and write their captions.

    Args:
        package: the unpacked npm package.
        folder: of the pictures and `captions.jsonl`.
    """
    folder.mkdir(parents=True)
    pictures: dict[str, str] = {}  # file by caption
    for facts in json.loads((package / "data/openmoji.json").read_text(encoding="utf-8")):
        if not facts["skintone"] and facts["group"] != "component":
            pictures.setdefault(facts["annotation"], facts["hexcode"])
    for name in tqdm(pictures.values()):
        source, target = package / "color/svg" / f"{name}.svg", folder / f"{name}.png"
        line = ["rsvg-convert", "-w", str(SIZE), "-h", str(SIZE), "-b", "white", "-o", target, source]
        subprocess.run(line, check=True)
    lines = [json.dumps({"file": f"{name}.png", "caption": text}) for text, name in pictures.items()]
    (folder / "captions.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
