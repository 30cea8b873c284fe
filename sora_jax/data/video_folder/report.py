"""What became of every file of a folder: kept, changed or refused, each with its reason."""

from sora_jax.data.video_folder.captions import Folder


def make_report(folder, found: Folder, results: dict, splits: dict[str, str]) -> dict:
    """The report as JSON: lists `kept`, `changed` and `refused`, `remarks` and counts.

    results: {file name: Checked or the reason of refusal}. Described in docs/formats_dataset.md.
    """
    kept, changed = [], []
    refused = [{"file_name": name, "reason": reason} for name, reason in found.refused]
    for entry in found.entries:
        checked = results[entry.file_name]
        if isinstance(checked, str):
            refused.append({"file_name": entry.file_name, "reason": checked})
            continue
        item = {
            "file_name": entry.file_name, "split": splits[entry.file_name],
            "num_captions": len(entry.captions), "num_frames": checked.num_frames,
            "height": checked.height, "width": checked.width, "fps": round(checked.fps, 3),
            "notes": list(checked.notes),
        }
        if checked.changes:
            changed.append({**item, "changes": list(checked.changes)})
        else:
            kept.append(item)
    refused.sort(key=lambda item: item["file_name"])
    remarks = list(found.remarks)
    usable = kept + changed
    if usable and not any(item["split"] == "held_out" for item in usable):
        remarks.append("no clip is held out; evaluation needs one")
    return {
        "folder": str(folder),
        "counts": {"kept": len(kept), "changed": len(changed), "refused": len(refused),
                   "train": sum(item["split"] == "train" for item in usable),
                   "held_out": sum(item["split"] == "held_out" for item in usable)},
        "remarks": remarks, "kept": kept, "changed": changed, "refused": refused,
    }


def report_text(report: dict) -> str:
    """The report for people: counts first, then every file that is not plainly kept."""
    counts = report["counts"]
    lines = [
        f"{report['folder']}: {counts['kept']} clips kept, {counts['changed']} changed, "
        f"{counts['refused']} refused; {counts['train']} for training, "
        f"{counts['held_out']} held out"
    ]
    lines += [f"  remark   {remark}" for remark in report["remarks"]]
    for item in report["changed"]:
        lines += [f"  changed  {item['file_name']}: {change}" for change in item["changes"]]
    lines += [f"  refused  {item['file_name']}: {item['reason']}" for item in report["refused"]]
    for item in report["kept"] + report["changed"]:
        lines += [f"  note     {item['file_name']}: {note}" for note in item["notes"]]
    return "\n".join(lines)
