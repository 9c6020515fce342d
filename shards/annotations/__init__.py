"""Annotations that are not mask images: COCO, LabelMe, CVAT, Label Studio, YOLO."""
