"""From files of images to batches: index, decoded images, verification pairs, embeddings, columns."""
