//! Strict reading of safetensors files: nothing missing, nothing left over, nothing outside the folder.

use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom};
use std::path::{Component, Path, PathBuf};

use pacs_torch::tch::{Kind, Tensor};
use safetensors::tensor::{Dtype, TensorInfo};
use serde::Deserialize;

use crate::ModelError;

/// The headers of a model folder's weight files; tensors are read one by one.
pub(crate) struct Checkpoint {
    place: PathBuf,
    shards: Vec<Shard>,
    tensors: BTreeMap<String, Entry>,
}

struct Shard {
    path: PathBuf,
    file: File,
}

struct Entry {
    shard: usize,
    kind: Kind,
    shape: Vec<i64>,
    start: u64,
    bytes: usize,
}

impl Checkpoint {
    /// Reads the headers of `model.safetensors`, or of the shards that `model.safetensors.index.json` names.
    pub(crate) fn open(dir: &Path) -> Result<Self, ModelError> {
        let single = dir.join("model.safetensors");
        let index = dir.join("model.safetensors.index.json");
        if single.exists() {
            return Self::open_file(single);
        }
        if !index.exists() {
            return Err(ModelError::NoWeights { folder: dir.to_owned() });
        }
        let shards = read_index(&index)?;
        let mut checkpoint = Self { place: index, shards: Vec::new(), tensors: BTreeMap::new() };
        // A shard that is not there says more than what the others lack for it.
        let files: Vec<File> = shards.keys().map(|shard| open(&dir.join(shard))).collect::<Result<_, _>>()?;
        for ((shard, names), file) in shards.into_iter().zip(files) {
            checkpoint.add_shard(dir.join(shard), file, Some(&names))?;
        }
        Ok(checkpoint)
    }

    /// Reads the header of one file.
    pub(crate) fn open_file(path: PathBuf) -> Result<Self, ModelError> {
        let mut checkpoint = Self { place: path.clone(), shards: Vec::new(), tensors: BTreeMap::new() };
        let file = open(&path)?;
        checkpoint.add_shard(path, file, None)?;
        Ok(checkpoint)
    }

    /// The file that says which tensors there are.
    pub(crate) fn place(&self) -> &Path {
        &self.place
    }

    /// Every tensor: name, file, shape.
    pub(crate) fn tensors(&self) -> impl Iterator<Item = (&str, &Path, &[i64])> {
        self.tensors
            .iter()
            .map(|(name, entry)| (name.as_str(), self.shards[entry.shard].path.as_path(), entry.shape.as_slice()))
    }

    pub(crate) fn contains(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// The file and the values of a tensor that is there; refuses NaN and infinity.
    pub(crate) fn read(&self, name: &str) -> Result<(&Path, Tensor), ModelError> {
        self.read_part(name, 0, &self.tensors[name].shape)
    }

    /// The same of a part of it: the elements from `first` on that make up `shape`.
    ///
    /// # Panics
    /// When the tensor has not so many.
    pub(crate) fn read_part(&self, name: &str, first: usize, shape: &[i64]) -> Result<(&Path, Tensor), ModelError> {
        let entry = &self.tensors[name];
        let Shard { path, file } = &self.shards[entry.shard];
        let size = entry.kind.elt_size_in_bytes();
        let bytes = shape.iter().product::<i64>() as usize * size;
        assert!(first * size + bytes <= entry.bytes, "`{name}` ends before a part of it");
        let mut data = vec![0; bytes];
        let mut file = file;
        let start = entry.start + (first * size) as u64;
        let read = file.seek(SeekFrom::Start(start)).and_then(|_| file.read_exact(&mut data));
        read.map_err(ModelError::io("read", path))?;
        let tensor = Tensor::f_from_data_size(&data, shape, entry.kind)?;
        // NaN and infinity survive a sum.
        if !tensor.f_sum(Kind::Float)?.f_double_value(&[])?.is_finite() {
            return Err(ModelError::NotFinite { file: path.clone(), tensor: name.to_owned() });
        }
        Ok((path, tensor))
    }

    /// Adds the tensors of one file. With an index, exactly those that it places there.
    fn add_shard(&mut self, path: PathBuf, mut file: File, placed: Option<&[String]>) -> Result<(), ModelError> {
        let (data_start, header) = read_header(&path, &mut file)?;
        let length = file.metadata().map_err(ModelError::io("read", &path))?.len();
        check_extent(&path, data_start, length, &header)?;
        if let Some(placed) = placed {
            check_placement(&path, placed, &header)?;
        }
        for (name, info) in header {
            let Some(kind) = weight_kind(info.dtype) else {
                let found = format!("{:?}", info.dtype);
                return Err(ModelError::WrongKind { file: path, tensor: name, found });
            };
            let (begin, end) = info.data_offsets;
            let shape = info.shape.iter().map(|&size| size as i64).collect();
            let entry =
                Entry { shard: self.shards.len(), kind, shape, start: data_start + begin as u64, bytes: end - begin };
            self.tensors.insert(name, entry);
        }
        self.shards.push(Shard { path, file });
        Ok(())
    }
}

fn open(path: &Path) -> Result<File, ModelError> {
    File::open(path).map_err(ModelError::io("open", path))
}

fn weight_kind(dtype: Dtype) -> Option<Kind> {
    match dtype {
        Dtype::F32 => Some(Kind::Float),
        Dtype::F16 => Some(Kind::Half),
        Dtype::BF16 => Some(Kind::BFloat16),
        _ => None,
    }
}

#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

/// Shard file name to the tensors that the index places there.
fn read_index(path: &Path) -> Result<BTreeMap<String, Vec<String>>, ModelError> {
    let text = fs::read_to_string(path).map_err(ModelError::io("read", path))?;
    let index: Index = serde_json::from_str(&text).map_err(|error| ModelError::config(path, error.to_string()))?;
    let mut shards: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for (tensor, shard) in index.weight_map {
        let mut parts = Path::new(&shard).components();
        let plain = matches!((parts.next(), parts.next()), (Some(Component::Normal(_)), None));
        if !plain || shard.contains(['/', '\\']) {
            return Err(ModelError::ShardEscapes { index: path.to_owned(), tensor, shard });
        }
        shards.entry(shard).or_default().push(tensor);
    }
    Ok(shards)
}

/// The tensors of a file by offset, and the byte at which their data starts.
fn read_header(path: &Path, file: &mut File) -> Result<(u64, Vec<(String, TensorInfo)>), ModelError> {
    // The limit of the reference implementation.
    const LARGEST_HEADER: u64 = 100_000_000;
    let mut size = [0; 8];
    file.read_exact(&mut size).map_err(|_| ModelError::corrupt(path, "it is shorter than a safetensors header"))?;
    let size = u64::from_le_bytes(size);
    if size > LARGEST_HEADER {
        return Err(ModelError::corrupt(path, "its first eight bytes are not the size of a safetensors header"));
    }
    let mut text = Vec::new();
    file.take(size).read_to_end(&mut text).map_err(ModelError::io("read", path))?;
    if text.len() as u64 != size {
        return Err(ModelError::corrupt(path, "it ends within the safetensors header"));
    }
    let header: HashMap<String, serde_json::Value> = serde_json::from_slice(&text)
        .map_err(|error| ModelError::corrupt(path, format!("its safetensors header is not JSON: {error}")))?;
    let mut tensors = Vec::with_capacity(header.len());
    for (name, value) in header.into_iter().filter(|(name, _)| name != "__metadata__") {
        let info: TensorInfo = serde_json::from_value(value)
            .map_err(|error| ModelError::corrupt(path, format!("header entry of tensor `{name}`: {error}")))?;
        tensors.push((name, info));
    }
    tensors.sort_by_key(|(_, info)| info.data_offsets);
    Ok((8 + size, tensors))
}

/// Tensors must fill the file without gaps, each as large as its shape and kind say.
fn check_extent(path: &Path, data_start: u64, length: u64, header: &[(String, TensorInfo)]) -> Result<(), ModelError> {
    let mut position = 0usize;
    for (name, info) in header {
        let (begin, end) = info.data_offsets;
        let bits = info.shape.iter().try_fold(info.dtype.bitsize(), |bits, &size| bits.checked_mul(size));
        if begin != position || end < begin || bits != (end - begin).checked_mul(8) {
            let detail = format!("shape, kind and offsets of tensor `{name}` do not fit together");
            return Err(ModelError::corrupt(path, detail));
        }
        let needed = data_start.saturating_add(end as u64);
        if needed > length {
            return Err(ModelError::Truncated { file: path.to_owned(), tensor: name.clone(), needed, found: length });
        }
        position = end;
    }
    if data_start + position as u64 != length {
        return Err(ModelError::corrupt(path, "it has bytes after its last tensor"));
    }
    Ok(())
}

fn check_placement(path: &Path, placed: &[String], header: &[(String, TensorInfo)]) -> Result<(), ModelError> {
    // The index is sorted by tensor name, so are its per-shard lists.
    let is_placed = |name: &String| placed.binary_search(name).is_ok();
    if let Some((tensor, _)) = header.iter().find(|(name, _)| !is_placed(name)) {
        let reason = "the index does not place there";
        return Err(ModelError::Unexpected { file: path.to_owned(), tensor: tensor.clone(), reason });
    }
    let held = |name: &&String| header.iter().any(|(other, _)| other == *name);
    let missing: Vec<_> = placed.iter().filter(|name| !held(name)).cloned().collect();
    if missing.is_empty() {
        return Ok(());
    }
    Err(ModelError::Missing { place: path.to_owned(), tensors: missing })
}
