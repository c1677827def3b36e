"""Images and labels in: decoding, datasets with their manifests and splits, the pixel cache, augmentation."""
