//! Tensors of safetensors files, read one by one in the kinds that weights have.

use std::collections::BTreeMap;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use pacs_shape::{WeightFile, WeightFiles};
use pacs_torch::tch::{Kind, Tensor};
use safetensors::tensor::Dtype;

use crate::ModelError;

/// The headers of a model folder's weight files; tensors are read one by one.
pub(crate) struct Checkpoint {
    place: PathBuf,
    shards: Vec<WeightFile>,
    tensors: BTreeMap<String, Entry>,
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
        let WeightFiles { place, files } = WeightFiles::open(dir)?;
        Self::of(place, files)
    }

    /// Reads the header of one file.
    pub(crate) fn open_file(path: &Path) -> Result<Self, ModelError> {
        Self::of(path.to_owned(), vec![WeightFile::open(path)?])
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
        let WeightFile { path, file, .. } = &self.shards[entry.shard];
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

    /// `place`: the file that says which tensors there are.
    fn of(place: PathBuf, files: Vec<WeightFile>) -> Result<Self, ModelError> {
        let mut tensors = BTreeMap::new();
        for (shard, file) in files.iter().enumerate() {
            for (name, info) in &file.tensors {
                let Some(kind) = weight_kind(info.dtype) else {
                    let (file, found) = (file.path.clone(), format!("{:?}", info.dtype));
                    return Err(ModelError::WrongKind { file, tensor: name.clone(), found });
                };
                let (begin, end) = info.data_offsets;
                let shape = info.shape.iter().map(|&size| size as i64).collect();
                let start = file.data_start + begin as u64;
                tensors.insert(name.clone(), Entry { shard, kind, shape, start, bytes: end - begin });
            }
        }
        Ok(Self { place, shards: files, tensors })
    }
}

fn weight_kind(dtype: Dtype) -> Option<Kind> {
    match dtype {
        Dtype::F32 => Some(Kind::Float),
        Dtype::F16 => Some(Kind::Half),
        Dtype::BF16 => Some(Kind::BFloat16),
        _ => None,
    }
}
