"""Packaging: the folder `kernels/` holds the package `ood_kernels`, so that no top-level module is called `kernels`."""

from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = "0.1.0"

# Every lower bound is run: constraints/lowest.txt.
CLI = ["click>=8.1", "rich>=13", "tqdm>=4.66", "pyarrow>=15", "pillow>=10", "matplotlib>=3.8", "jinja2>=3.1"]
# torch's own builds for a GPU bring the Triton they were made for; alone it is needed to interpret and to compile kernels.
TRITON = ["triton>=3.7; platform_system == 'Linux'"]
# What the peers of the benchmarks import; none of it asks for torch.
PEER_IMPORTS = ["scipy>=1.11.1", "pillow>=10", "faiss-cpu>=1.8", "datasets>=2.19"]
TEST = [*TRITON, *PEER_IMPORTS, "pytest>=8", "pytest-benchmark>=4", "hypothesis>=6.100", "ruff>=0.17.6", "mypy>=2.4.1"]

setup(
    name="ood-engine",
    version=VERSION,
    description="Post-hoc out-of-distribution scores for PyTorch classifiers from the last feature map and layer alone",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    package_dir={"ood_kernels": "kernels/ood_kernels", "ood_engine": "ood_engine"},
    # Compiling ahead of time and executing compiled code are for a checkout.
    packages=[
        *find_packages(include=["ood_engine", "ood_engine.*"]),
        *find_packages(
            "kernels", exclude=["ood_kernels.aot", "ood_kernels.emulation", "ptx_emulator", "ptx_emulator.*"]
        ),
    ],
    package_data={
        "ood_kernels": ["py.typed"],
        "ood_kernels.cpu": ["*.cpp"],
        "ood_kernels.triton_kernels": ["configs/*.json"],
        "ood_engine": ["py.typed"],
        "ood_engine.evaluation.report": ["*.j2"],
    },
    install_requires=["torch>=2.13", "numpy>=1.26", "scikit-learn>=1.4", "safetensors>=0.4.3"],
    extras_require={
        "cli": CLI,
        "triton": TRITON,
        "test": [*CLI, *TEST],
        "bench": [*CLI, *PEER_IMPORTS, "pytest-benchmark>=4"],
        "docs": [*CLI, "pdoc>=16"],
    },
    entry_points={"console_scripts": ["ood-engine = ood_engine.cli:main"]},
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
