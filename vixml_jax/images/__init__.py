"""Images, from encoded files to feature vectors on the devices."""
