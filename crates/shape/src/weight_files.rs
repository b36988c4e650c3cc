//! The weight files of a model folder, by their headers: no tensor is missing, left over, or outside the folder.
//!
//! A safetensors file is eight bytes with the length of its header (little-endian), the header as JSON, and the values.

use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Component, Path, PathBuf};

use safetensors::tensor::TensorInfo;
use serde::Deserialize;

use crate::ShapeError;
use crate::config::parse;

/// Name of the weight file in a folder that has one.
pub const WEIGHTS_FILE: &str = "model.safetensors";
/// Name of the file that places tensors in weight files, in a folder that has several.
pub const WEIGHTS_INDEX: &str = "model.safetensors.index.json";
/// Longest header that is read, in bytes: the limit of the reference implementation.
const LONGEST_HEADER: u64 = 100_000_000;

/// Why the weight files of a folder cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WeightFileError {
    /// The index is not one.
    #[error(transparent)]
    Index(#[from] ShapeError),
    /// A weight file or the index cannot be opened or read.
    #[error("{verb} `{}`: {source}", path.display())]
    Io {
        /// What was tried.
        verb: &'static str,
        /// The file that it was tried on.
        path: PathBuf,
        /// The operating system's answer.
        source: io::Error,
    },
    /// The folder holds no safetensors weights.
    #[error(
        "no weights in `{}`: neither model.safetensors nor model.safetensors.index.json is there (PyTorch .bin files \
         are not read)", folder.display()
    )]
    NoWeights {
        /// The model folder that was searched.
        folder: PathBuf,
    },
    /// The index names a file that is not a plain file name.
    #[error("`{}` places tensor `{tensor}` in `{shard}`, which is outside the model folder", index.display())]
    ShardEscapes {
        /// The index file.
        index: PathBuf,
        /// Name of the tensor, as the file has it.
        tensor: String,
        /// The file name given for it.
        shard: String,
    },
    /// The header of a safetensors file is not one.
    #[error("`{}` is corrupt: {detail}; fetch or export it again", file.display())]
    Corrupt {
        /// Path of the safetensors file.
        file: PathBuf,
        /// What is wrong with it.
        detail: String,
    },
    /// A file ends before a tensor does.
    #[error(
        "`{}` is truncated: tensor `{tensor}` ends at byte {needed}, the file at byte {found}; \
         fetch or export it again",
        file.display()
    )]
    Truncated {
        /// Path of the safetensors file.
        file: PathBuf,
        /// The first tensor that is not whole.
        tensor: String,
        /// Where the tensor ends.
        needed: u64,
        /// Where the file ends.
        found: u64,
    },
    /// Tensors that the index or the architecture names are not in the files.
    #[error("`{}` lacks {}", place.display(), list(tensors))]
    Missing {
        /// The file or folder.
        place: PathBuf,
        /// Names of the missing tensors.
        tensors: Vec<String>,
    },
    /// A file holds a tensor that the index does not place there, or that the architecture does not have.
    #[error("`{}` holds tensor `{tensor}`, which {reason}", file.display())]
    Unexpected {
        /// Path of the safetensors file.
        file: PathBuf,
        /// Name of the tensor, as the file has it.
        tensor: String,
        /// Why it does not belong there.
        reason: &'static str,
    },
}

impl WeightFileError {
    fn io<'a>(verb: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> Self + 'a {
        move |source| Self::Io { verb, path: path.to_owned(), source }
    }

    fn corrupt(file: &Path, detail: impl Into<String>) -> Self {
        Self::Corrupt { file: file.to_owned(), detail: detail.into() }
    }
}

fn list(tensors: &[String]) -> String {
    let shown: Vec<_> = tensors.iter().take(3).map(|name| format!("`{name}`")).collect();
    let noun = if tensors.len() == 1 { "tensor" } else { "tensors" };
    match tensors.len().saturating_sub(shown.len()) {
        0 => format!("{noun} {}", shown.join(", ")),
        more => format!("{noun} {} and {more} more", shown.join(", ")),
    }
}

/// All weight files of a model folder, opened.
#[derive(Debug)]
pub struct WeightFiles {
    /// The file that says which tensors there are: the only weight file, or the index.
    pub place: PathBuf,
    /// In alphabetical order.
    pub files: Vec<WeightFile>,
}

/// A safetensors file with its header. Values are not read.
#[derive(Debug)]
pub struct WeightFile {
    /// Where the file is.
    pub path: PathBuf,
    /// The same, open for reading.
    pub file: File,
    /// Byte of the file at which values begin; offsets of tensors count from there.
    pub data_start: u64,
    /// Name, kind, shape and offsets of each tensor, in the order of their values.
    pub tensors: Vec<(String, TensorInfo)>,
}

impl WeightFiles {
    /// Whether a folder has a weight file or an index, whatever is in them.
    #[must_use]
    pub fn are_in(folder: &Path) -> bool {
        [WEIGHTS_FILE, WEIGHTS_INDEX].iter().any(|name| folder.join(name).exists())
    }

    /// Opens `model.safetensors`, or the files that `model.safetensors.index.json` names, and checks their headers.
    ///
    /// A whole file is the model, whatever an index next to it says.
    ///
    /// # Errors
    /// When there are none, one is missing, corrupt or truncated, or does not hold exactly what the index places there.
    pub fn open(folder: &Path) -> Result<Self, WeightFileError> {
        let (whole, index) = (folder.join(WEIGHTS_FILE), folder.join(WEIGHTS_INDEX));
        if whole.exists() {
            return Ok(Self { files: vec![WeightFile::open(&whole)?], place: whole });
        }
        if !index.exists() {
            return Err(WeightFileError::NoWeights { folder: folder.to_owned() });
        }
        let placed = read_index(&index)?;
        let paths: Vec<PathBuf> = placed.keys().map(|name| folder.join(name)).collect();
        // All are opened first: a file that is not there says more than what the others lack for it.
        let opened: Vec<File> = paths.iter().map(|path| open(path)).collect::<Result<_, _>>()?;
        let mut files = Vec::with_capacity(paths.len());
        for ((path, file), names) in paths.into_iter().zip(opened).zip(placed.values()) {
            let file = WeightFile::read(path, file)?;
            file.check_placement(names)?;
            files.push(file);
        }
        Ok(Self { place: index, files })
    }
}

impl WeightFile {
    /// Opens one file and checks its header.
    ///
    /// # Errors
    /// When it is missing, corrupt or truncated.
    pub fn open(path: &Path) -> Result<Self, WeightFileError> {
        Self::read(path.to_owned(), open(path)?)
    }

    /// Number of elements of all tensors.
    #[must_use]
    pub fn elements(&self) -> u64 {
        self.tensors.iter().map(|(_, info)| info.shape.iter().product::<usize>() as u64).sum()
    }

    fn read(path: PathBuf, mut file: File) -> Result<Self, WeightFileError> {
        let (data_start, tensors) = read_header(&path, &mut file)?;
        let length = file.metadata().map_err(WeightFileError::io("read", &path))?.len();
        check_extent(&path, data_start, length, &tensors)?;
        Ok(Self { path, file, data_start, tensors })
    }

    /// `placed`: names of the tensors that the index places in this file, sorted.
    fn check_placement(&self, placed: &[String]) -> Result<(), WeightFileError> {
        let is_placed = |name: &String| placed.binary_search(name).is_ok();
        if let Some((tensor, _)) = self.tensors.iter().find(|(name, _)| !is_placed(name)) {
            let reason = "the index does not place there";
            return Err(WeightFileError::Unexpected { file: self.path.clone(), tensor: tensor.clone(), reason });
        }
        let held = |name: &&String| self.tensors.iter().any(|(other, _)| other == *name);
        let missing: Vec<_> = placed.iter().filter(|name| !held(name)).cloned().collect();
        if missing.is_empty() {
            return Ok(());
        }
        Err(WeightFileError::Missing { place: self.path.clone(), tensors: missing })
    }
}

fn open(path: &Path) -> Result<File, WeightFileError> {
    File::open(path).map_err(WeightFileError::io("open", path))
}

#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

/// Name of each weight file, and the tensors that the index places there, sorted.
fn read_index(path: &Path) -> Result<BTreeMap<String, Vec<String>>, WeightFileError> {
    let text = fs::read_to_string(path).map_err(WeightFileError::io("read", path))?;
    let index: Index = parse(&text, path)?;
    let mut files: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for (tensor, shard) in index.weight_map {
        let mut parts = Path::new(&shard).components();
        let plain = matches!((parts.next(), parts.next()), (Some(Component::Normal(_)), None));
        if !plain || shard.contains(['/', '\\']) {
            return Err(WeightFileError::ShardEscapes { index: path.to_owned(), tensor, shard });
        }
        files.entry(shard).or_default().push(tensor);
    }
    if files.is_empty() {
        return Err(ShapeError::config(path, "its `weight_map` names no file").into());
    }
    Ok(files)
}

/// The byte at which values begin, and the tensors by offset.
fn read_header(path: &Path, file: &mut File) -> Result<(u64, Vec<(String, TensorInfo)>), WeightFileError> {
    let corrupt = |detail: &str| WeightFileError::corrupt(path, detail);
    let mut length = [0; 8];
    file.read_exact(&mut length).map_err(|_| corrupt("it is shorter than a safetensors header"))?;
    let length = u64::from_le_bytes(length);
    if length > LONGEST_HEADER {
        return Err(corrupt("its first eight bytes are not the size of a safetensors header"));
    }
    // Grows with what is there: a length is only a claim.
    let mut text = Vec::new();
    file.take(length).read_to_end(&mut text).map_err(WeightFileError::io("read", path))?;
    if text.len() as u64 != length {
        return Err(corrupt("it ends within the safetensors header"));
    }
    let header: HashMap<String, serde_json::Value> = serde_json::from_slice(&text)
        .map_err(|error| corrupt(&format!("its safetensors header is not JSON: {error}")))?;
    let mut tensors = Vec::with_capacity(header.len());
    for (name, value) in header.into_iter().filter(|(name, _)| name != "__metadata__") {
        let info: TensorInfo = serde_json::from_value(value)
            .map_err(|error| corrupt(&format!("header entry of tensor `{name}`: {error}")))?;
        tensors.push((name, info));
    }
    tensors.sort_by_key(|(_, info)| info.data_offsets);
    Ok((8 + length, tensors))
}

/// Tensors must fill the file without gaps, each as large as its shape and kind say.
fn check_extent(
    path: &Path,
    data_start: u64,
    length: u64,
    tensors: &[(String, TensorInfo)],
) -> Result<(), WeightFileError> {
    let mut position = 0usize;
    for (name, info) in tensors {
        let (begin, end) = info.data_offsets;
        let bits = info.shape.iter().try_fold(info.dtype.bitsize(), |bits, &size| bits.checked_mul(size));
        if begin != position || end < begin || bits.is_none() || bits != (end - begin).checked_mul(8) {
            let detail = format!("shape, kind and offsets of tensor `{name}` do not fit together");
            return Err(WeightFileError::corrupt(path, detail));
        }
        let needed = data_start.saturating_add(end as u64);
        if needed > length {
            let (file, tensor) = (path.to_owned(), name.clone());
            return Err(WeightFileError::Truncated { file, tensor, needed, found: length });
        }
        position = end;
    }
    if data_start + position as u64 != length {
        return Err(WeightFileError::corrupt(path, "it has bytes after its last tensor"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::golden_models;

    #[test]
    fn the_files_of_an_index_hold_the_model() {
        let folder = golden_models::folder().join("qwen2-untied");
        assert!(WeightFiles::are_in(&folder));
        let weights = WeightFiles::open(&folder).unwrap();
        assert!(weights.place.ends_with(WEIGHTS_INDEX) && weights.files.len() == 2);
        assert_eq!(weights.files.iter().map(WeightFile::elements).sum::<u64>(), 238_816);
        for file in &weights.files {
            let (_, last) = file.tensors.last().unwrap();
            assert_eq!(file.data_start + last.data_offsets.1 as u64, fs::metadata(&file.path).unwrap().len());
        }
    }

    /// A file with this header, which claims to be `length` bytes long, and `data` bytes of values.
    fn with_header(length: u64, header: &str, data: usize) -> Result<WeightFile, String> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(WEIGHTS_FILE);
        fs::write(&path, [&length.to_le_bytes()[..], header.as_bytes(), vec![0; data].as_slice()].concat()).unwrap();
        WeightFile::open(&path).map_err(|error| error.to_string())
    }

    #[test]
    fn a_header_is_no_more_than_a_claim() {
        let tensor = |shape: &str, offsets: &str| {
            let header = format!(r#"{{"w": {{"dtype": "F32", "shape": {shape}, "data_offsets": {offsets}}}}}"#);
            with_header(header.len() as u64, &header, 8)
        };
        assert_eq!(tensor("[2]", "[0, 8]").unwrap().elements(), 2);
        for (found, expected) in [
            (with_header(u64::MAX, "{}", 0), "not the size of a safetensors header"),
            (with_header(LONGEST_HEADER + 1, "{}", 0), "not the size of a safetensors header"),
            (with_header(LONGEST_HEADER, "{}", 0), "ends within the safetensors header"),
            (with_header(2, "[]", 0), "is not JSON"),
            (with_header(2, "{}", 1), "bytes after its last tensor"),
            (tensor("[3]", "[0, 8]"), "do not fit together"),
            (tensor("[2]", "[8, 0]"), "do not fit together"),
            (tensor("[1]", "[4, 8]"), "do not fit together"),
            (tensor("[4611686018427387904, 2]", "[0, 8]"), "do not fit together"),
            (tensor("[4611686018427387904]", "[0, 18446744073709551615]"), "do not fit together"),
            (tensor("[-1]", "[0, 8]"), "header entry of tensor `w`"),
            (tensor("[3]", "[0, 12]"), "is truncated: tensor `w`"),
        ] {
            let found = found.map(|file| file.tensors).unwrap_err();
            assert!(found.contains(expected), "{found}");
        }
    }

    #[test]
    fn an_index_places_what_is_there_and_nothing_else() {
        let golden = golden_models::folder().join("qwen2-untied");
        let folder = tempfile::tempdir().unwrap();
        let open = || WeightFiles::open(folder.path()).map(drop).map_err(|error| error.to_string());
        assert!(!WeightFiles::are_in(folder.path()) && open().unwrap_err().contains("no weights in"));
        let shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"];
        for name in shards {
            fs::copy(golden.join(name), folder.path().join(name)).unwrap();
        }
        let index = fs::read_to_string(golden.join(WEIGHTS_INDEX)).unwrap();
        let write = |text: &str| fs::write(folder.path().join(WEIGHTS_INDEX), text).unwrap();
        write(&format!("\u{feff}{index}"));
        assert_eq!(open(), Ok(()));
        for (from, to, expected) in [
            (shards[1], "../model-00002-of-00002.safetensors", "outside the model folder"),
            (shards[1], "model-00003.safetensors", "open `"),
            ("\"model.norm.weight\"", "\"model.other.weight\"", "which the index does not place there"),
        ] {
            write(&index.replace(from, to));
            let found = open().unwrap_err();
            assert!(found.contains(expected), "{found}");
        }
        write(r#"{"weight_map": {}}"#);
        assert!(open().unwrap_err().contains("names no file"));
    }
}
