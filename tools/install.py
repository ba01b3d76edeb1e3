"""Make a virtual environment with everything resnext_det needs; a second run installs nothing.

    python tools/install.py
    python tools/install.py --folder .venv --detectron2 source

It runs before anything is installed, so it uses only the standard library, and only syntax that
Pythons too old for the package can parse: they say so instead of failing.
"""

import argparse
import hashlib
import os
import platform
import shutil
import subprocess
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
REQUIREMENTS = os.path.join(ROOT, "requirements")
OLDEST, NEWEST = (3, 10), (3, 14)
DETECTRON2_SOURCE = "git+https://github.com/facebookresearch/detectron2.git@a59f0563"


def main():
    """Install what is missing and check that it imports."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--folder", default=os.path.join(ROOT, ".venv"), help="of the environment (default: .venv)"
    )
    parser.add_argument(
        "--detectron2",
        choices=["wheel", "source"],
        default="wheel",
        help="a wheel (default), or upstream's source, which needs a compiler",
    )
    arguments = parser.parse_args()
    refuse_other_pythons()
    folder = os.path.abspath(arguments.folder)
    stamp = os.path.join(folder, "resnext_det.installed")
    wanted = fingerprint(arguments.detectron2)
    if read(stamp) == wanted:
        return
    make_environment(folder, stamp)
    write(stamp, "not finished")
    python = os.path.join(folder, "Scripts" if os.name == "nt" else "bin", "python")
    install(python, arguments.detectron2)
    verify(python)
    write(stamp, wanted)
    print("Installed into {}".format(folder))


def refuse_other_pythons():
    """Exit, unless the requirements were locked for this Python."""
    if OLDEST <= sys.version_info[:2] <= NEWEST:
        return
    sys.exit(
        "error: this is Python {} ({}), and resnext_det needs Python 3.10 to 3.14. "
        "Name one of them: make PYTHON=/path/to/python3.11 ...".format(
            platform.python_version(), sys.executable
        )
    )


def fingerprint(detectron2):
    """Return a digest that changes with the requirements, the Python and the kind of Detectron2."""
    digest = hashlib.sha256()
    for text in (detectron2, "{}.{}".format(*sys.version_info[:2]), platform.machine()):
        digest.update(text.encode())
    names = [os.path.join(REQUIREMENTS, name) for name in sorted(os.listdir(REQUIREMENTS))]
    for name in [*names, os.path.join(ROOT, "pyproject.toml"), os.path.abspath(__file__)]:
        with open(name, "rb") as file:
            digest.update(file.read())
    return digest.hexdigest()


def read(name):
    """Return the text of a file, or None if there is none."""
    if not os.path.exists(name):
        return None
    with open(name) as file:
        return file.read()


def write(name, text):
    """Write a text file."""
    with open(name, "w") as file:
        file.write(text)


def make_environment(folder, stamp):
    """Create the virtual environment; replace one of another Python if this script made it."""
    version = environment_version(folder)
    if version == platform.python_version():
        return
    if version is not None and os.path.exists(stamp):
        shutil.rmtree(folder)
    elif version is not None:
        sys.exit(
            "error: {} is a virtual environment of Python {} that this script did not make; name "
            "another folder, or remove it.".format(folder, version)
        )
    elif os.path.exists(folder) and (not os.path.isdir(folder) or os.listdir(folder)):
        sys.exit("error: {} is not a virtual environment; move it away first.".format(folder))
    if subprocess.call([sys.executable, "-m", "venv", folder]) != 0:
        sys.exit(
            "error: Python's venv module failed. On Debian and Ubuntu: "
            "apt-get install python{}.{}-venv".format(*sys.version_info[:2])
        )


def environment_version(folder):
    """Return the Python version of a virtual environment, or None if it is not one."""
    for line in (read(os.path.join(folder, "pyvenv.cfg")) or "").splitlines():
        name, _, value = line.partition("=")
        if name.strip() == "version":
            return value.strip()
    return None


def install(python, detectron2):
    """Install the locked requirements, then Detectron2, then this package in editable form."""
    pip(python, "--require-hashes", "-r", os.path.join(REQUIREMENTS, "lock.txt"))
    if detectron2 == "source":
        pip(python, "--no-build-isolation", "--no-deps", DETECTRON2_SOURCE)
    else:
        pip(python, *wheel_options(python), "-r", os.path.join(REQUIREMENTS, "detectron2.txt"))
    pip(python, "--no-deps", "--no-build-isolation", "-e", ROOT)


def wheel_options(python):
    """Return the options that make pip install Detectron2's wheel on any Python and system."""
    query = "import sysconfig; print(sysconfig.get_path('purelib'))"
    packages = subprocess.check_output([python, "-c", query], universal_newlines=True).strip()
    return [
        *["--no-deps", "--require-hashes", "--upgrade", "--target", packages],
        *["--only-binary=:all:", "--python-version", "3.10", "--implementation", "cp"],
        *["--platform", "manylinux2014_x86_64"],
    ]


def pip(python, *arguments):
    """Run pip install; exit if it fails."""
    command = [python, "-m", "pip", "install", "--disable-pip-version-check", *arguments]
    print("+ " + " ".join(command), flush=True)
    if subprocess.call(command) != 0:
        sys.exit("error: the command above failed; see its output, fix that, and run this again.")


def verify(python):
    """Exit if the installed package does not import."""
    if subprocess.call([python, "-c", "import resnext_det"], cwd=os.path.dirname(python)) != 0:
        sys.exit("error: everything is installed, but `import resnext_det` fails; see above.")


if __name__ == "__main__":
    main()
