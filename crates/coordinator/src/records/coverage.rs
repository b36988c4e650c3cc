//! Checks that the files of a save hold a complete training state. What a rank reports about them is only a claim, and
//! an empty checkpoint must not replace a complete one.
//!
//! Only headers are read: which parameters a state file holds, and that its tensors have that length.
//! Checksums verify the content.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{self, Read};
use std::ops::Range;
use std::path::Path;

use pacs_algo::Objective;
use pacs_shape::{ModelConfig, ParameterLayout};
use pacs_spec::JobSpec;
use serde_json::{Map, Value};

use super::{Manifest, RankFile};
use crate::FileError;

/// Name prefixes of state files: the policy's, and those of the value model where there is one.
const POLICY: &str = "training-state";
const VALUE_MODEL: &str = "value-model-state";
/// Tensors of every state file; each has one element per parameter.
const STATE: [&str; 3] = ["master", "moment1", "moment2"];
const MODEL_CONFIG: &str = "model/config.json";
/// Longest header of a safetensors file that is read.
const MAX_HEADER_BYTES: u64 = 64 << 20;

/// Content that a checkpoint of a job must have.
#[derive(Clone, Debug)]
pub(crate) struct Coverage {
    /// Name prefix of the state files of each network, and the number of parameters that they hold together.
    networks: Vec<(&'static str, usize)>,
    /// Number of parameters of the exported model.
    exported: usize,
}

impl Coverage {
    /// Of a job that trains `trained`: the parameters of `model`, or adapters of it.
    pub(crate) fn new(spec: &JobSpec, model: &ModelConfig, trained: &ModelConfig) -> Self {
        let total = |config: &ModelConfig| ParameterLayout::new(config).total();
        let has_values = match spec.objective.objective(spec.rollout.max_new_tokens) {
            Objective::Policy(policy) => policy.value.is_some(),
            Objective::Pacs(_) | Objective::Real(_) | Objective::Disco(_) | Objective::External => false,
        };
        let values = has_values.then(|| (VALUE_MODEL, total(&trained.of_values())));
        let networks = [(POLICY, total(trained))].into_iter().chain(values).collect();
        Self { networks, exported: model.parameter_count() }
    }

    /// Checks the files of a checkpoint in `folder`; their sizes were verified before.
    pub(super) fn check(&self, folder: &Path, manifest: &Manifest) -> Result<(), FileError> {
        let files: Vec<&RankFile> = manifest.files.values().flatten().collect();
        let names: BTreeSet<&str> = files.iter().map(|file| file.path.as_str()).collect();
        if names.len() < files.len() {
            return Err(FileError::damaged(folder, "two ranks have reported one file"));
        }
        for (prefix, parameters) in &self.networks {
            let is_of = |name: &str| name.starts_with(prefix) && name.ends_with(".safetensors");
            for entry in fs::read_dir(folder).map_err(FileError::file("list folder", folder))? {
                let name = entry.map_err(FileError::file("list folder", folder))?.file_name();
                let name = name.to_string_lossy();
                if is_of(&name) && !names.contains(&*name) {
                    return Err(FileError::damaged(&folder.join(&*name), "no rank has reported it"));
                }
            }
            let mut ranges = Vec::new();
            for file in files.iter().filter(|file| is_of(&file.path)) {
                let path = folder.join(&file.path);
                ranges.extend(state(&path, file.bytes, manifest.step)?);
            }
            covers(&mut ranges, *parameters).map_err(|problem| {
                FileError::damaged(
                    folder,
                    format!("the files `{prefix}….safetensors` {problem} of {parameters} parameters"),
                )
            })?;
        }
        if manifest.model {
            self.check_model(folder, &files, &names)?;
        }
        Ok(())
    }

    fn check_model(&self, folder: &Path, files: &[&RankFile], names: &BTreeSet<&str>) -> Result<(), FileError> {
        if !names.contains(MODEL_CONFIG) {
            return Err(FileError::damaged(folder, format!("no rank has reported `{MODEL_CONFIG}`")));
        }
        let mut elements = 0usize;
        for file in files.iter().filter(|file| file.path.starts_with("model/") && file.path.ends_with(".safetensors")) {
            let path = folder.join(&file.path);
            let header = Header::read(&path, file.bytes)?;
            for (_, held) in header.tensors()? {
                elements = elements.saturating_add(held);
            }
        }
        if elements < self.exported {
            let problem = format!("the exported model has {elements} of {} parameters", self.exported);
            return Err(FileError::damaged(&folder.join("model"), problem));
        }
        Ok(())
    }
}

/// The parameter ranges of a state file, if it holds everything that the next step needs of them.
fn state(path: &Path, bytes: u64, step: u64) -> Result<Vec<Range<usize>>, FileError> {
    let header = Header::read(path, bytes)?;
    let damaged = |problem: String| FileError::damaged(path, problem);
    let said = |name: &str| header.values["__metadata__"][name].as_str().unwrap_or_default();
    if said("step") != step.to_string() {
        return Err(damaged(format!("is of step {:?}, not of step {step}", said("step"))));
    }
    let range = |text: &str| {
        let (start, len) = text.split_once('+')?;
        let (start, len): (usize, usize) = (start.parse().ok()?, len.parse().ok()?);
        (len > 0).then_some(start..start.checked_add(len)?)
    };
    let ranges: Option<Vec<_>> = said("ranges").split_whitespace().map(range).collect();
    let ranges = ranges.ok_or_else(|| damaged("does not say which parameters it holds".to_owned()))?;
    let held = ranges.iter().try_fold(0usize, |held, range| held.checked_add(range.len()));
    let tensors = header.tensors()?;
    for name in STATE {
        let elements = tensors.iter().find(|(known, _)| *known == name).map(|(_, elements)| *elements);
        if elements.is_none() || elements != held {
            let problem =
                format!("`{name}` has {} elements for {} parameters", elements.unwrap_or(0), held.unwrap_or(0));
            return Err(damaged(problem));
        }
    }
    Ok(ranges)
}

/// Checks that the ranges cover `parameters` exactly once.
fn covers(ranges: &mut [Range<usize>], parameters: usize) -> Result<(), String> {
    ranges.sort_unstable_by_key(|range| range.start);
    let mut end = 0;
    for range in ranges {
        match range.start.cmp(&end) {
            std::cmp::Ordering::Equal => end = range.end,
            std::cmp::Ordering::Less => return Err(format!("hold parameter {} twice", range.start)),
            std::cmp::Ordering::Greater => return Err(format!("do not hold parameter {end}")),
        }
    }
    if end == parameters { Ok(()) } else { Err(format!("hold {end}")) }
}

/// The header of a safetensors file.
struct Header<'a> {
    path: &'a Path,
    values: Map<String, Value>,
    /// Bytes of the tensor data.
    data: u64,
}

impl<'a> Header<'a> {
    fn read(path: &'a Path, bytes: u64) -> Result<Self, FileError> {
        let read = || -> io::Result<Vec<u8>> {
            let mut file = File::open(path)?;
            let mut length = [0; 8];
            file.read_exact(&mut length)?;
            let mut header = Vec::new();
            file.take(u64::from_le_bytes(length).min(MAX_HEADER_BYTES)).read_to_end(&mut header)?;
            Ok(header)
        };
        let text = read().map_err(|error| FileError::damaged(path, format!("has no header: {error}")))?;
        let values = serde_json::from_slice(&text).ok();
        let values = values.ok_or_else(|| FileError::damaged(path, "its header is not that of a safetensors file"))?;
        let data = bytes.saturating_sub(8 + text.len() as u64);
        Ok(Self { path, values, data })
    }

    /// Names and element counts of the tensors; checks that each has the bytes of its shape and lies within the file.
    fn tensors(&self) -> Result<Vec<(&str, usize)>, FileError> {
        let tensors = self.values.iter().filter(|(name, _)| *name != "__metadata__");
        let checked = tensors.map(|(name, value)| {
            let elements = self.elements(value).ok_or_else(|| {
                FileError::damaged(self.path, format!("what it says of `{}` does not fit it", name.escape_debug()))
            })?;
            Ok((name.as_str(), elements))
        });
        checked.collect()
    }

    fn elements(&self, value: &Value) -> Option<usize> {
        let size = match value["dtype"].as_str()? {
            "F64" => 8,
            "F32" => 4,
            "F16" | "BF16" => 2,
            _ => return None,
        };
        let elements = value["shape"]
            .as_array()?
            .iter()
            .try_fold(1usize, |elements, size| elements.checked_mul(usize::try_from(size.as_u64()?).ok()?))?;
        let [start, end] = [value["data_offsets"][0].as_u64()?, value["data_offsets"][1].as_u64()?];
        let bytes = u64::try_from(elements.checked_mul(size)?).ok()?;
        (end.checked_sub(start)? == bytes && end <= self.data).then_some(elements)
    }
}

/// A state file of zeros with these parameter ranges, for tests.
#[cfg(test)]
pub(crate) fn state_file(step: u64, ranges: &str, elements: usize) -> Vec<u8> {
    let bytes = 4 * elements;
    let tensor = |place: usize| serde_json::json!({"dtype": "F32", "shape": [elements], "data_offsets": [place * bytes, (place + 1) * bytes]});
    let metadata = serde_json::json!({"step": step.to_string(), "ranges": ranges});
    let header = serde_json::json!({
        "__metadata__": metadata, "master": tensor(0), "moment1": tensor(1), "moment2": tensor(2),
    });
    let header = header.to_string();
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend_from_slice(header.as_bytes());
    file.resize(file.len() + 3 * bytes, 0);
    file
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use pacs_machine::Snapshot;

    use super::*;

    const STEP: u64 = 7;

    fn coverage() -> Coverage {
        Coverage { networks: vec![(POLICY, 10), (VALUE_MODEL, 4)], exported: 8 }
    }

    fn manifest(files: &[(&str, Vec<u8>)], model: bool, folder: &Path) -> Manifest {
        let text = "name = 'test'\nmodel.path = 'm'\ndata.train.path = 'x.jsonl'\n\
                    evaluation = { before = false, after = false, every_steps = 0 }\n";
        let spec = pacs_spec::parse(text, Path::new("test")).unwrap();
        let file = |(path, content): &(&str, Vec<u8>)| {
            fs::create_dir_all(folder.join(path).parent().unwrap()).unwrap();
            fs::write(folder.join(path), content).unwrap();
            RankFile { path: (*path).into(), bytes: content.len() as u64, crc32: 0 }
        };
        let files = BTreeMap::from([(0, files.iter().map(file).collect())]);
        Manifest::new(Snapshot { step: STEP, ..Snapshot::default() }, model, &spec, files)
    }

    fn whole() -> Vec<(&'static str, Vec<u8>)> {
        vec![
            ("training-state-0-of-2.safetensors", state_file(STEP, "0+3 6+4", 7)),
            ("training-state-1-of-2.safetensors", state_file(STEP, "3+3", 3)),
            ("value-model-state.safetensors", state_file(STEP, "0+4", 4)),
        ]
    }

    fn problem(files: &[(&str, Vec<u8>)], model: bool) -> String {
        let folder = tempfile::tempdir().unwrap();
        let checked = coverage().check(folder.path(), &manifest(files, model, folder.path()));
        checked.err().map_or_else(String::new, |error| error.to_string())
    }

    #[test]
    fn a_whole_state_is_every_parameter_once() {
        assert_eq!(problem(&whole(), false), "");
        let with = |place: usize, content: Vec<u8>| {
            let mut files = whole();
            files[place].1 = content;
            problem(&files, false)
        };
        let without = |place: usize| {
            let mut files = whole();
            files.remove(place);
            problem(&files, false)
        };
        let has = |said: String, part: &str| assert!(said.contains(part), "{part}: {said}");
        has(problem(&[], false), "hold 0 of 10 parameters");
        has(without(1), "do not hold parameter 3");
        has(without(2), "hold 0 of 4 parameters");
        has(with(1, state_file(STEP, "2+4", 4)), "hold parameter 2 twice");
        has(with(2, state_file(STEP, "0+3", 3)), "hold 3 of 4");
        has(with(2, state_file(STEP, "0+4", 3)), "`master` has 3 elements for 4 parameters");
        has(with(2, state_file(STEP - 1, "0+4", 4)), "is of step \"6\"");
        has(with(2, state_file(STEP, "0+18446744073709551615 1+2", 4)), "for 0 parameters");
        has(with(2, state_file(STEP, "0+4 -1+2", 4)), "does not say which");
        has(with(2, Vec::new()), "has no header");
        has(with(2, vec![0xff; 100]), "its header is not");
        let mut cut = state_file(STEP, "0+4", 4);
        cut.truncate(cut.len() - 1);
        has(with(2, cut), "does not fit it");
    }

    #[test]
    fn an_unreported_file_is_not_part_of_the_state() {
        let folder = tempfile::tempdir().unwrap();
        let manifest = manifest(&whole(), false, folder.path());
        fs::write(folder.path().join("training-state-9-of-9.safetensors"), state_file(STEP, "0+10", 10)).unwrap();
        let error = coverage().check(folder.path(), &manifest).unwrap_err();
        assert!(error.to_string().contains("no rank has reported it"), "{error}");
    }

    #[test]
    fn an_exported_model_has_its_parameters() {
        let exported = |elements: usize| {
            let mut files = whole();
            files.push(("model/config.json", b"{}".to_vec()));
            // Three tensors of `elements` elements.
            files.push(("model/model.safetensors", state_file(STEP, "", elements)));
            problem(&files, true)
        };
        assert_eq!(exported(3), "");
        assert!(exported(2).contains("has 6 of 8 parameters"), "{}", exported(2));
        assert!(problem(&whole(), true).contains("model/config.json"));
    }
}
