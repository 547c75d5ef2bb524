"""A script that loads checkpoints in a new process, compares their logits bit for bit and saves them again."""

LOAD_ALL = """
import sys, warnings, torch
torch.set_num_threads(1)
warnings.simplefilter("error")
import hf_compress
from hf_compress.recipe.reload import in_own_memory
from transformers import AutoModelForImageClassification
for folder in sys.argv[1:]:
    x, logits = torch.load(f"{folder}/expected.pt")
    model, info = AutoModelForImageClassification.from_pretrained(f"{folder}/model", output_loading_info=True)
    assert not any(info.values()), (folder, info)
    in_own_memory(model)
    with torch.no_grad():
        found = model(x).logits
    assert torch.equal(found, logits), (folder, float((found - logits).abs().max()))
    model.save_pretrained(f"{folder}/again")
print("all", len(sys.argv) - 1)
"""
