"""Medical volumes, their preparation as tensorflow-datasets builders, augmentation and loading."""
