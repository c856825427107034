"""What the tests of the statistics read and write."""

import csv
import gzip
import io
import json
from pathlib import Path


def read_csv(path: Path) -> list[dict[str, str]]:
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return list(csv.DictReader(io.StringIO(data.decode())))


def run_folder(folder: Path) -> Path:
    evaluation = folder / "evaluation"
    evaluation.mkdir(parents=True)
    rows = [
        {"prompt": f"p{i}", "completions": {"SFT": "a", "RTO": "b"}, "gold": {"SFT": float(i), "RTO": i + 1.0}}
        for i in range(3)
    ]
    (evaluation / "completions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    methods = {"SFT": {"gold": 1.0, "kl": 0.0}, "RTO": {"gold": 2.0, "kl": 3.5}}
    results = {"gold": "gold_reward", "baseline": "SFT", "prompts": 3, "methods": methods}
    (evaluation / "results.json").write_text(json.dumps(results))
    return folder
