"""QLoRA beside LoRA on 16 bits, and beside bitsandbytes and PEFT: loss after the same steps, and seconds a step.

Every side trains the same adapter (rank, rate, windows in the same order) on the first windows of a text and is
measured on its last ones, by transformers' Trainer, in BF16 autocast where the machine has units for it. Our sides run
in this environment: `--bases` are formats, and fp32 is the model itself. The peer runs in an environment of its own
that has bitsandbytes, transformers and peft. Seconds are those of the clock and those of the processor; the latter
compare sides on a busy machine, with OMP_NUM_THREADS=1, because threads that wait are counted too.

    python bench/qlora.py MODEL --text shakespeare.txt --steps 150 --bases fp32 nf4-dq
    python bench/qlora.py MODEL --text shakespeare.txt --steps 12 --bases nf4-dq --peer PYTHON --rounds 3
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

PEER = "bitsandbytes"
SECONDS = ("step_seconds", "step_cpu_seconds")


def settings(args: argparse.Namespace) -> dict[str, Any]:
    names = ("steps", "window", "batch", "rank", "rate", "windows")
    return {name: getattr(args, name) for name in names}


def model_in(base: str, path: Path, folder: Path) -> Any:
    """The frozen base, as a transformers model."""
    if base == PEER:
        import torch
        from transformers import AutoModelForCausalLM, BitsAndBytesConfig

        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
        return AutoModelForCausalLM.from_pretrained(path, quantization_config=config, dtype=torch.float32)
    import fewbits

    if base == "fp32":
        return fewbits.load(path)
    fewbits.quantize(path, folder / base, format=base, kind="fewbits", prove=False)
    return fewbits.load(folder / base)


def with_adapter(model: Any, rank: int, *, ours: bool) -> Any:
    from peft import LoraConfig, get_peft_model

    if ours:
        from fewbits.train.lora import register

        register()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.config.use_cache = False
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=names, task_type="CAUSAL_LM")
    return get_peft_model(model, config)


def trained(base: str, path: Path, text: Path, s: dict[str, Any]) -> dict[str, Any]:
    """Train one side. Returns its losses and the median seconds of a step, by the clock and of the processor."""
    import torch
    from transformers import AutoTokenizer, Trainer, TrainerCallback, TrainingArguments

    torch.manual_seed(0)
    ids = AutoTokenizer.from_pretrained(path)(text.read_text(encoding="utf-8"))["input_ids"]
    count = min(len(ids) // s["window"], s["windows"])
    windows = torch.tensor(ids[: count * s["window"]]).view(count, s["window"])
    rows = [{"input_ids": row, "labels": row} for row in windows]
    held = max(1, count // 20)
    seconds: list[tuple[float, float]] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.since = time.perf_counter(), time.process_time()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock, processor = self.since
            seconds.append((time.perf_counter() - clock, time.process_time() - processor))

    with tempfile.TemporaryDirectory() as folder:
        model = with_adapter(model_in(base, path, Path(folder)), s["rank"], ours=base != PEER)
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=s["steps"],
            per_device_train_batch_size=s["batch"],
            per_device_eval_batch_size=s["batch"],
            learning_rate=s["rate"],
            lr_scheduler_type="cosine",
            weight_decay=0.0,
            gradient_checkpointing=True,
            gradient_checkpointing_kwargs={"use_reentrant": False},
            bf16=bool(torch.cpu.get_capabilities().get("avx512_bf16")),
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
            save_strategy="no",
            logging_strategy="no",
            label_names=["labels"],
            dataloader_pin_memory=False,
            seed=0,
        )
        trainer = Trainer(
            model=model, args=arguments, train_dataset=rows[:-held], eval_dataset=rows[-held:], callbacks=[Clock()]
        )
        before = trainer.evaluate()["eval_loss"]
        trainer.train()
        after = trainer.evaluate()["eval_loss"]
    clock, processor = (statistics.median(each) for each in zip(*(seconds[1:] or seconds), strict=True))
    return {"base": base, "before": before, "after": after, "step_seconds": clock, "step_cpu_seconds": processor}


def run(python: str, base: str, args: argparse.Namespace) -> dict[str, Any]:
    """One side in a process of its own."""
    command = [python, __file__, str(args.model), "--text", str(args.text), "--one", base]
    command += [part for name, value in settings(args).items() for part in (f"--{name}", str(value))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{base} failed: {done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--bases", nargs="+", default=["fp32", "nf4-dq"])
    parser.add_argument("--peer", metavar="PYTHON", help="of an environment with bitsandbytes, transformers and peft")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--windows", type=int, default=1200, help="of the text, at most")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(trained(args.one, args.model, args.text, settings(args))))
        return
    sides = [(sys.executable, base) for base in args.bases] + ([(args.peer, PEER)] if args.peer else [])
    rounds = [[run(python, base, args) for python, base in sides] for _ in range(args.rounds)]
    print("| base | held-out loss | after | seconds a step | of the processor |\n|---|---|---|---|---|")
    rows = []
    for found in zip(*rounds, strict=True):
        times = {name: statistics.median(each[name] for each in found) for name in SECONDS}
        rows.append(found[0] | times)
        losses = f"{found[0]['before']:.4f} | {found[0]['after']:.4f}"
        print(f"| {found[0]['base']} | {losses} | {' | '.join(f'{each:.3f}' for each in times.values())} |")
    print(
        json.dumps({"bench": "qlora", "model": args.model.name, **settings(args), "rounds": args.rounds, "rows": rows})
    )


if __name__ == "__main__":
    main()
