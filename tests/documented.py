"""Extract the commands of the README and docs/, and name those that are not run, with the reason."""

import dataclasses
import re
from pathlib import Path

from DeBERTa.config import TrainConfig
from tests.conftest import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCED = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"(?<!`)`([^`]+)`(?!`)")
PROGRAM = re.compile(
    r"\./(?:mlm|rtd)\.sh|python3? (?:-m )?[\w./]+|bash [\w./]+\.sh|torchrun\b|srun\b|sbatch\b|sky\b|kubectl\b"
    r"|docker\b|pip install\b|deberta-\w+ --|tensorboard --|mkdir |export \w+=|source \S|for \w+ in "
)
# What runs at the size of the workspace of tests/slow/test_documented_commands.py.
RUN = re.compile(
    r"(DATA=sample )?\./(mlm|rtd)\.sh|mkdir |deberta-"
    r"|python (-m DeBERTa\.|prepare_data\.py|experiments/ablations/table\.py)"
)
# The first pattern found in a command says why it is not run.
NOT_RUN = {
    r"^(pip install|source) |pip install tensorboard": "changes the Python that runs the tests",
    r"^tensorboard ": "serves until it is stopped",
    r"^python experiments/track\.py": "needs a tracker; tests/test_track.py runs it with TensorBoard",
    r"--glue ": "needs `datasets` and a network",
    r"^python experiments/finetune/": "needs labeled files; tests/experiments/test_finetune.py runs it",
    r"^python experiments/ablations/bert": "needs a run; tests/experiments/test_ablations.py trains one",
    r"^python experiments/ablations/run": "takes hours; tests/slow/test_ablations.py runs it at a small size",
    r"^pip download": "needs a network",
    r"tests/run\.sh tests/slow": "runs slow tests, among them the one of these commands",
    r"tests/run\.sh": "runs the tests themselves; the gate (.ci/run) is this command",
    r"docs/generate_|benchmarks\.cost": "writes a page of docs/; a test compares it with what it would write",
    r"reference": "needs runs of three seeds; tests/report/test_reference.py compares with such",
    r"DeBERTa\.doctor": "fails where the machine lacks something; tests/test_doctor.py runs it",
    r"benchmarks/gpu\.sh": "needs a GPU; tests/benchmarks/test_gpu.py runs its parts on a CPU",
    r"^export WORLD_SIZE": "needs two nodes; tests/slow/test_two_nodes.py runs it",
    r"^(docker|kubectl|sky) ": "needs Docker or a cluster; tests/test_cluster.py checks the files",
    r"srun|sbatch|scontrol": "needs Slurm; tests/slow/test_slurm.py runs such jobs",
    r"^torchrun|-m DeBERTa\.train FLAGS": "FLAGS stands for any; tests/slow/test_two_nodes.py runs torchrun",
    r"hf:OWNER/NAME|from_pretrained\(OWNER": "stands for any model; tests/hub/test_published.py loads one",
    r"stream\.py": "stands for any program; tests/data/test_sources.py reads standard input",
    r"\bNAME\b": "stands for any preset; tests/test_presets.py reads them all",
    r"^python (-m DeBERTa\.(train|probe)|prepare_data\.py)$": "names the command alone",
    r"^deberta-": "a console command of the installed package; tests/test_packaging.py runs it",
}
# Flags of other programs: pip, torchrun, Slurm, Docker, Kubernetes, TensorBoard, transformers.
FOREIGN = {
    *("--nnodes", "--node_rank", "--rdzv", "--rdzv_backend", "--rdzv_id", "--rdzv_endpoint"),
    *("--master_addr", "--master_port", "--nodes", "--ntasks-per-node", "--gpus-per-node", "--exclusive"),
    *(
        "--no-binary",
        "--no-deps",
        "--signal",
        "--cpus-per-task",
        "--time",
        "--logdir",
        "--gpus",
        "--shm-size",
        "--rm",
        "--ipc",
    ),
}


def extract_commands(text: str) -> list[str]:
    """Return the shell commands of a Markdown page, of fenced blocks and inline code, each once.

    A script, and what follows `export`, is one command. Comments and line continuations are removed.
    """
    found = []
    for language, block in FENCED.findall(text):
        if language not in ("bash", "sh", "shell", "console"):
            continue
        if block.startswith("#!"):
            found.append(block.strip())
            continue
        lines = re.sub(r"\\\n\s*", "", block).splitlines()
        commands = [line for line in (re.sub(r"(^|\s+)#.*$", "", line).strip() for line in lines) if line]
        exports = [command for command in commands if command.startswith("export ")]
        others = [command for command in commands if command not in exports]
        found += ["; ".join([*exports, command]) for command in others or [""] if exports or command]
    spans = [" ".join(span.split()) for span in INLINE.findall(FENCED.sub("", text))]
    found += [span for span in spans if PROGRAM.match(re.sub(r"^[A-Z_]+=\S+ ", "", span))]
    return list(dict.fromkeys(found))


def extract_all() -> list[tuple[Path, str]]:
    """Return the commands of all pages with the page each is first on."""
    first: dict[str, Path] = {}
    for page in PAGES:
        for command in extract_commands(page.read_text(encoding="utf-8")):
            first.setdefault(command, page)
    return [(page, command) for command, page in first.items()]


def find_reason(command: str) -> str | None:
    """Return why a command is not run, or None if it is run."""
    return next((reason for pattern, reason in NOT_RUN.items() if re.search(pattern, command)), None)


def extract_flags(text: str) -> set[str]:
    """Return the long flags that a text names; not those that a family stands for, such as `--init_*`."""
    return set(re.findall(r"(?<![\w-])--[a-z][\w-]*[a-z0-9](?![\w*-])", text))


def find_known_flags(*sources: Path) -> set[str]:
    """Return the flags that the sources of commands add to their parsers."""
    texts = [path.read_text(encoding="utf-8") for path in sources]
    return {flag for text in texts for flag in re.findall(r"[\"'](--[a-z][\w-]*)[\"']", text)} | {"--help"}


def find_sources(command: str) -> list[Path]:
    """Return the sources that define the flags of a command."""
    if match := re.search(r"-m DeBERTa\.(\w+)", command):
        name, package = match[1], ROOT / "DeBERTa" / match[1]
        sources = [package / "__main__.py"] if package.is_dir() else [package.with_suffix(".py")]
        return [*sources, *([ROOT / "DeBERTa" / "flags.py"] if name == "train" else [])]
    if "prepare_data.py" in command:
        return [ROOT / "DeBERTa" / "prepare_data.py"]
    if re.search(r"(mlm|rtd)\.sh|deberta-(train|prepare)", command):
        return [ROOT / "DeBERTa" / "flags.py"]
    match = re.search(r"(experiments|benchmarks)/[\w/]+\.py", command)
    return [ROOT / match[0]] if match else []


def find_flags(command: str) -> set[str]:
    """Return the flags that a command has."""
    sources = find_sources(command)
    is_training = any(path.name == "flags.py" for path in sources)
    train = {f"--{field.name}" for field in dataclasses.fields(TrainConfig)} if is_training else set()
    return find_known_flags(*sources) | train
