"""What the README's and docs' figures come from: speed, memory, and the toy over several seeds."""
