"""The commands of `resnext-det`: `run`, for arguments that `resnext_det_cli` has parsed."""
