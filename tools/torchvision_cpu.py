"""Lets torchvision import beside a CPU-only torch, where its compiled operators are missing.

timm and transformers import torchvision; the wheel on the package index is built for CUDA and its operators do not
load on a CPU build of torch. Declaring the operators' schemas is enough for the import. `make venv` puts this file
and a `.pth` that imports it into the project's own virtual environment; it is no part of the tokcompile package.
"""

import importlib.abc
import importlib.machinery
import sys

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "roi_align(Tensor input, Tensor rois, float spatial_scale, SymInt pooled_height, SymInt pooled_width,"
    " int sampling_ratio, bool aligned) -> Tensor",
    "roi_pool(Tensor input, Tensor rois, float spatial_scale, SymInt pooled_height, SymInt pooled_width) -> (Tensor, Tensor)",
    "ps_roi_align(Tensor input, Tensor rois, float spatial_scale, SymInt pooled_height, SymInt pooled_width,"
    " int sampling_ratio) -> (Tensor, Tensor)",
    "ps_roi_pool(Tensor input, Tensor rois, float spatial_scale, SymInt pooled_height, SymInt pooled_width)"
    " -> (Tensor, Tensor)",
    "deform_conv2d(Tensor input, Tensor weight, Tensor offset, Tensor mask, Tensor bias, SymInt stride_h,"
    " SymInt stride_w, SymInt pad_h, SymInt pad_w, SymInt dil_h, SymInt dil_w, SymInt groups,"
    " SymInt offset_groups, bool use_mask) -> Tensor",
)
_libraries = []  # a Library's definitions live as long as the object


class _DeclareBeforeTorchvision(importlib.abc.MetaPathFinder):
    """Declares the missing schemas the moment torchvision is first imported, then steps aside."""

    def find_spec(self, name, path=None, target=None):
        if name != "torchvision":
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is not None:
            import torch

            if not torch.cuda.is_available() and torch.version.cuda is None:
                library = torch.library.Library("torchvision", "DEF")
                for schema in _SCHEMAS:
                    library.define(schema)
                _libraries.append(library)
        return spec


sys.meta_path.insert(0, _DeclareBeforeTorchvision())
