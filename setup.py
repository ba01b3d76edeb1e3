"""Package metadata. torch and Detectron2 are installed first: see README.md."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="resnext_det",
    version="0.1.0",
    description="ResNeXt for Detectron2: backbone, ImageNet weights, training and evaluation",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10,<3.13",
    # The configs stand at the top of the repository and are installed inside the package.
    packages=[*find_packages(include=["resnext_det", "resnext_det.*"]), "resnext_det.configs"],
    package_dir={"resnext_det.configs": "configs"},
    package_data={
        "resnext_det": ["py.typed", "report/*.j2"],
        "resnext_det.configs": ["*.yaml", "*.py"],
    },
    # Detectron2 has no name on the package index that pip could resolve.
    install_requires=[
        "torch>=2.6",
        "torchvision",
        "numpy<2",
        "setuptools<81",
        "fvcore",
        "pycocotools",
        "hotcoco>=1.3",
        "safetensors",
        "filelock",
        "pillow",
        "matplotlib",
        "jinja2",
        "tqdm",
        "tabulate",
        "pyyaml",
    ],
    # FFmpeg for demo.py's videos; its wheels hold libx264 and libx265, which are GPL.
    extras_require={"video": ["av"]},
)
