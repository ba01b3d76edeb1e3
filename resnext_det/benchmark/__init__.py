"""The package beside stock Detectron2, torchvision and OpenVINO: time, memory, agreement."""
