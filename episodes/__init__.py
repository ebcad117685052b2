"""Where clips come from: pose algebra, windows and crops, and the sources without TensorFlow."""
