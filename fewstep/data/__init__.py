"""Where training images, labels and pairs come from."""
