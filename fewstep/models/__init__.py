"""Networks behind one face: every model is a `Backbone`, and what combines backbones is a `Backbone` too."""
