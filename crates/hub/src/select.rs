//! Which files of a repository are wanted, as pure functions of its list of files.

use pacs_spec::FileFormat;
use std::path::Path;

/// Weights in one file.
pub(crate) const WHOLE: &str = "model.safetensors";
/// Says in which files weights are otherwise.
pub(crate) const INDEX: &str = "model.safetensors.index.json";

/// Endings of the small files of a model: configurations, templates, vocabularies.
const TEXTS: [&str; 3] = [".json", ".jinja", ".txt"];

/// Files that are shown when none was meant.
const SHOWN: usize = 12;

/// The files of a model that are no weights: those at the top of the repository.
pub(crate) fn texts_of_model<'a>(files: impl Iterator<Item = &'a str>) -> Vec<&'a str> {
    let is_text = |path: &&str| {
        let is_known =
            TEXTS.iter().any(|ending| path.ends_with(ending)) || ["tokenizer.model", "LICENSE"].contains(path);
        // Indices are of weights, and ours comes with them.
        !path.contains('/') && is_known && !path.ends_with(".index.json")
    };
    files.filter(is_text).collect()
}

/// What a model's weights are in.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Weights {
    /// All weights in one file.
    Whole,
    /// Those that the index names.
    Indexed,
}

/// How the weights of a model are stored, or why they cannot be used.
pub(crate) fn weights_of_model<'a>(files: impl Iterator<Item = &'a str> + Clone) -> Result<Weights, String> {
    let has = |name: &str| files.clone().any(|path| path == name);
    if !has("config.json") {
        return Err(match has("adapter_config.json") {
            true => "it holds an adapter (LoRA) and no model; merge it into its base model first".to_owned(),
            false => "it has no config.json at its top, so it is no model in the format of transformers".to_owned(),
        });
    }
    if has(WHOLE) {
        return Ok(Weights::Whole);
    }
    if has(INDEX) {
        return Ok(Weights::Indexed);
    }
    let other =
        files.clone().find(|path| [".bin", ".gguf", ".pt", ".pth", ".h5"].iter().any(|ending| path.ends_with(ending)));
    Err(match other {
        Some(path) => {
            format!("its weights are not stored as safetensors (it has `{path}`); other formats are not read")
        }
        None => format!("it has neither `{WHOLE}` nor `{INDEX}`"),
    })
}

/// The files that an index of weights names.
pub(crate) fn indexed(text: &str) -> Result<Vec<String>, String> {
    let json: serde_json::Value =
        serde_json::from_str(text).map_err(|error| format!("`{INDEX}` is no JSON: {error}"))?;
    let map = json.get("weight_map").and_then(|map| map.as_object()).ok_or(format!("`{INDEX}` has no `weight_map`"))?;
    let mut names: Vec<String> = map.values().filter_map(|name| name.as_str()).map(str::to_owned).collect();
    names.sort_unstable();
    names.dedup();
    if names.is_empty() { Err(format!("`{INDEX}` names no file")) } else { Ok(names) }
}

/// Files of a data set that are one source of problems.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct DataFiles {
    /// Path of the source: that of the file, or a pattern with one `*` for several.
    pub(crate) source: String,
    /// The files, in order.
    pub(crate) files: Vec<String>,
}

/// The files of a data set that `wanted` means: a file, a pattern, `config/split`, `split`, or nothing where there is one split only.
pub(crate) fn data_files(files: &[&str], wanted: &str) -> Result<DataFiles, String> {
    if files.contains(&wanted) {
        return match FileFormat::of(Path::new(wanted)) {
            Some(_) => Ok(DataFiles { source: wanted.to_owned(), files: vec![wanted.to_owned()] }),
            None => Err(format!("`{wanted}`: {}", FileFormat::EXPECTED)),
        };
    }
    let splits = splits(files);
    let mut found: Vec<&Split> = splits.iter().filter(|split| split.is(wanted)).collect();
    // Parquet is what the hub makes of other formats next to them.
    if found.len() > 1 && found.iter().any(|split| split.is_parquet()) {
        found.retain(|split| split.is_parquet());
    }
    match found.as_slice() {
        [split] => Ok(DataFiles {
            source: split.pattern.clone(),
            files: split.files.iter().map(|f| (*f).to_owned()).collect(),
        }),
        [] => Err(format!("it has nothing for `{wanted}`; it has {}", listed(&splits))),
        several => Err(format!(
            "{} could be meant; it has {}",
            if wanted.is_empty() { "more than one split".to_owned() } else { format!("more than `{wanted}`") },
            listed_refs(several)
        )),
    }
}

/// Files that belong together: the shards of one split in one format.
#[derive(Debug)]
struct Split<'a> {
    /// `train`, `main/train`, …: the path without what numbers its shards and names its format.
    name: String,
    /// Path of all of its files, with a `*` where they differ.
    pattern: String,
    files: Vec<&'a str>,
}

impl Split<'_> {
    fn is_parquet(&self) -> bool {
        self.pattern.ends_with(".parquet")
    }

    /// Whether `wanted` means this split: its name, a pattern of its files, with or without the folder `data` that many keep it in.
    fn is(&self, wanted: &str) -> bool {
        let bare = self.name.strip_prefix("data/").unwrap_or(&self.name);
        // `default` is what the hub calls the configuration of a data set that has only one.
        let named = wanted.strip_prefix("default/").unwrap_or(wanted);
        wanted.is_empty() || wanted == self.pattern || [self.name.as_str(), bare].contains(&wanted) || bare == named
    }
}

/// The splits of a data set, by name.
fn splits<'a>(files: &[&'a str]) -> Vec<Split<'a>> {
    let mut splits: Vec<Split<'a>> = Vec::new();
    for file in files {
        if FileFormat::of(Path::new(file)).is_none() || is_description(file) {
            continue;
        }
        let (name, pattern) = split_of(file);
        match splits.iter_mut().find(|split| split.pattern == pattern) {
            Some(split) => split.files.push(file),
            None => splits.push(Split { name, pattern, files: vec![file] }),
        }
    }
    for split in &mut splits {
        split.files.sort_unstable();
        if let [only] = split.files[..] {
            split.pattern = only.to_owned();
        }
    }
    splits.sort_by(|a, b| a.name.cmp(&b.name));
    splits
}

/// Whether a file describes the data set and holds none of it.
fn is_description(path: &str) -> bool {
    let name = path.rsplit('/').next().unwrap_or(path);
    name.starts_with('.')
        || ["dataset_infos.json", "dataset_dict.json", "dataset_info.json", "state.json"].contains(&name)
}

/// The split that a file belongs to, and the pattern of its files. The hub numbers shards as `train-00000-of-00002.parquet`, and as
/// `train/0000.parquet` where it has converted a data set.
fn split_of(path: &str) -> (String, String) {
    let (folder, name) = path.rsplit_once('/').map_or(("", path), |(folder, name)| (folder, name));
    let within = |name: &str| if folder.is_empty() { name.to_owned() } else { format!("{folder}/{name}") };
    let (stem, extension) = name.split_once('.').unwrap_or((name, ""));
    let is_number = |text: &str| text.len() >= 4 && text.chars().all(|c| c.is_ascii_digit());
    let shard = stem.rsplit_once("-of-").and_then(|(before, count)| {
        let (split, number) = before.rsplit_once('-')?;
        (is_number(count) && is_number(number)).then_some(split)
    });
    match shard {
        Some(split) => (within(split), within(&format!("{split}-*.{extension}"))),
        None if is_number(stem) && !folder.is_empty() => (folder.to_owned(), within(&format!("*.{extension}"))),
        None => (within(stem), within(name)),
    }
}

fn listed(splits: &[Split<'_>]) -> String {
    listed_refs(&splits.iter().collect::<Vec<_>>())
}

fn listed_refs(splits: &[&Split<'_>]) -> String {
    let mut shown: Vec<String> = splits.iter().take(SHOWN).map(|split| format!("`{}`", split.pattern)).collect();
    if splits.len() > SHOWN {
        shown.push(format!("{} more", splits.len() - SHOWN));
    }
    if shown.is_empty() { "no file of problems".to_owned() } else { shown.join(", ") }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GSM8K: [&str; 7] = [
        ".gitattributes",
        "README.md",
        "dataset_infos.json",
        "main/test-00000-of-00001.parquet",
        "main/train-00000-of-00001.parquet",
        "socratic/test-00000-of-00001.parquet",
        "socratic/train-00000-of-00001.parquet",
    ];

    fn chosen(files: &[&str], wanted: &str) -> Result<(String, usize), String> {
        data_files(files, wanted).map(|found| (found.source, found.files.len()))
    }

    #[test]
    fn data_is_found_by_file_split_and_configuration() {
        let one = |path: &str| Ok((path.to_owned(), 1));
        assert_eq!(chosen(&GSM8K, "main/train"), one("main/train-00000-of-00001.parquet"));
        assert_eq!(chosen(&GSM8K, "socratic/test-00000-of-00001.parquet"), one("socratic/test-00000-of-00001.parquet"));
        let sharded = [
            "data/train-00000-of-00002.parquet",
            "data/train-00001-of-00002.parquet",
            "data/test-00000-of-00001.parquet",
        ];
        for wanted in ["train", "data/train", "default/train", "data/train-*.parquet"] {
            assert_eq!(chosen(&sharded, wanted), Ok(("data/train-*.parquet".to_owned(), 2)), "{wanted}");
        }
        assert_eq!(chosen(&["data/dapo-math-17k.parquet", "README.md"], ""), one("data/dapo-math-17k.parquet"));
        assert_eq!(chosen(&["train.jsonl", "train.parquet"], "train"), one("train.parquet"));
        assert_eq!(
            chosen(&["main/train/0000.parquet", "main/train/0001.parquet"], "main/train"),
            Ok(("main/train/*.parquet".to_owned(), 2))
        );
    }

    #[test]
    fn what_is_not_there_is_answered_with_what_is() {
        let unclear = chosen(&GSM8K, "").expect_err("four splits");
        assert!(
            unclear.contains("more than one split") && unclear.contains("`main/train-00000-of-00001.parquet`"),
            "{unclear}"
        );
        let unknown = chosen(&GSM8K, "main/validation").expect_err("no such split");
        assert!(unknown.contains("nothing for `main/validation`") && unknown.contains("socratic/test"), "{unknown}");
        assert!(chosen(&GSM8K, "README.md").is_err_and(|error| error.contains("expected a `.jsonl`")));
        assert!(chosen(&["README.md"], "train").is_err_and(|error| error.contains("no file of problems")));
    }

    #[test]
    fn models_are_safetensors_with_a_configuration() {
        let of = |files: &[&'static str]| weights_of_model(files.iter().copied());
        assert_eq!(of(&["config.json", WHOLE, INDEX]), Ok(Weights::Whole));
        assert_eq!(of(&["config.json", INDEX, "model-00001-of-00002.safetensors"]), Ok(Weights::Indexed));
        for (files, said) in [
            (&["adapter_config.json", "adapter_model.safetensors"][..], "adapter"),
            (&["README.md"], "no config.json"),
            (&["config.json", "pytorch_model.bin"], "`pytorch_model.bin`"),
            (&["config.json", "x/model.safetensors"], "neither"),
        ] {
            assert!(of(files).is_err_and(|error| error.contains(said)), "{files:?}");
        }
        let files = [
            "config.json",
            "tokenizer.json",
            "merges.txt",
            "chat_template.jinja",
            INDEX,
            "onnx/config.json",
            "README.md",
            WHOLE,
        ];
        let texts = texts_of_model(files.into_iter());
        assert_eq!(texts, ["config.json", "tokenizer.json", "merges.txt", "chat_template.jinja"]);
    }

    #[test]
    fn an_index_names_its_files_once() {
        let text = r#"{"weight_map": {"a": "m-2.safetensors", "b": "m-1.safetensors", "c": "m-2.safetensors"}}"#;
        assert_eq!(indexed(text), Ok(vec!["m-1.safetensors".to_owned(), "m-2.safetensors".to_owned()]));
        for text in ["{}", "[", r#"{"weight_map": {}}"#] {
            assert!(indexed(text).is_err(), "{text}");
        }
    }
}
