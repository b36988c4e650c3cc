//! Versions that are adapters, merged into their base without libtorch: servers are given whole models.
//!
//! Each weight is `W + scale B A`, computed in float32 from the weight files of the job's model, as the native engine and the learner's
//! export compute it (`crates/model/src/adapter.rs`). The files are opened once and never written, so nothing is carried from one version
//! to the next. The products of a sum are added in another order than libtorch's: a float32 weight may differ in its last bits, and
//! a bfloat16 one by a step where its sum is that near to the threshold. `crates/worker/tests/vllm_adapters.rs` compares both.
//!
//! Legend: `M` rows and `N` columns of a matrix, `R` rank.

use std::collections::HashMap;
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use half::{bf16, f16};
use pacs_shape::{Lora, ModelConfig, ParameterLayout, ParameterSpec, WeightFile, WeightFileError, WeightFiles};
use pacs_weights::{BaseDigest, Description, Digest, Received, WeightKind};
use safetensors::tensor::Dtype;

/// Columns whose sums stay in a core's nearest cache while rows of `A` pass by.
const BLOCK: usize = 1024;
/// Bound on the threads that merge a matrix.
const MOST_THREADS: usize = 8;

/// Why a version of adapters cannot be made a whole model.
#[derive(Debug, thiserror::Error)]
pub(crate) enum MergeError {
    /// The weight files of the model cannot be used.
    #[error(transparent)]
    Weights(#[from] WeightFileError),
    /// A tensor of the model is not what its configuration says.
    #[error("tensor `{tensor}` of `{}` {problem}", file.display())]
    Tensor {
        /// The weight file.
        file: PathBuf,
        /// Name of the tensor.
        tensor: String,
        /// What is wrong with it.
        problem: String,
    },
    /// A weight file was written after it had been opened.
    #[error("`{}` has changed since this worker opened it: adapters are merged into the model that the run has begun with", .0.display())]
    Changed(PathBuf),
    /// A file cannot be read.
    #[error("read {what}: {source}")]
    Io {
        /// What was read.
        what: String,
        /// Why it failed.
        source: io::Error,
    },
    /// Adapters were published, and the job trains the whole model, or the other way round.
    #[error("{found} was published, and this worker's job trains {expected}: both have to run the same job spec")]
    OtherContent {
        /// What was published.
        found: &'static str,
        /// What the job trains.
        expected: &'static str,
    },
    /// They are applied in another way.
    #[error("the adapters have {found}, and this worker's job asks for {expected}")]
    OtherAdapters {
        /// Rank, scale and targets of the learner's.
        found: String,
        /// The same of this worker's job.
        expected: String,
    },
    /// They belong to another base.
    #[error(
        "the adapters belong to a base with the digest {found}…, and `{}` of this worker has {expected}…: the learner's folder holds \
         other weights", model.display()
    )]
    OtherBase {
        /// This worker's model.
        model: PathBuf,
        /// First digits of the digest of the learner's base.
        found: String,
        /// The same of this worker's base.
        expected: String,
    },
    /// They are not of this model.
    #[error("{bytes} bytes of adapters do not fit this model, whose adapters have {expected}")]
    OtherSize {
        /// Bytes that were published.
        bytes: u64,
        /// Bytes that the adapters have.
        expected: u64,
    },
}

impl MergeError {
    /// Whether every later version would be refused, too.
    pub(crate) fn is_final(&self) -> bool {
        match self {
            Self::OtherContent { .. } | Self::OtherAdapters { .. } | Self::OtherBase { .. } | Self::Changed(_) => true,
            Self::Weights(_) | Self::Tensor { .. } | Self::Io { .. } | Self::OtherSize { .. } => false,
        }
    }
}

/// The untouched model that adapters are merged into.
#[derive(Debug)]
pub(crate) struct Base {
    model: PathBuf,
    files: Vec<WeightFile>,
    /// Of each file, when it was opened.
    stamps: Vec<Stamp>,
    layout: ParameterLayout,
    /// The layout of the adapters.
    adapters: ParameterLayout,
    lora: Lora,
    /// By name of the parameter.
    places: HashMap<String, Place>,
    /// The digest in the kind in which it was needed.
    digest: Mutex<Option<(WeightKind, Digest)>>,
}

/// What changes when a file is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stamp {
    bytes: u64,
    modified: (i64, i64),
}

/// Where a parameter lies.
#[derive(Clone, Copy, Debug)]
struct Place {
    file: usize,
    dtype: Dtype,
    /// Byte of the file at which it begins.
    start: u64,
}

impl Base {
    /// Opens the weight files of the folder `model`. Values are not read.
    ///
    /// # Errors
    /// When a file is missing or corrupt, or lacks a tensor of the model.
    ///
    /// # Panics
    /// When `trained` has no adapters.
    pub(crate) fn open(model: &Path, trained: &ModelConfig) -> Result<Self, MergeError> {
        let lora = trained.lora.clone().expect("the configuration has adapters");
        let layout = ParameterLayout::new(&trained.base());
        let WeightFiles { place, files } = WeightFiles::open(model)?;
        let mut tensors = HashMap::new();
        for (index, file) in files.iter().enumerate() {
            tensors.extend(file.tensors.iter().map(|(name, info)| (name.as_str(), (index, info))));
        }
        let (mut places, mut missing) = (HashMap::new(), Vec::new());
        for spec in layout.parameters() {
            // Experts may be stacked, one tensor for all of a layer.
            let stacked = || trained.experts.as_ref().and_then(|experts| spec.stacked(experts));
            let (found, shape, first) = match (tensors.get(spec.name.as_str()), stacked()) {
                (Some(found), _) => (Some(found), spec.shape.clone(), 0),
                (None, Some(part)) => (tensors.get(part.name.as_str()), part.shape, part.first),
                (None, None) => (None, Vec::new(), 0),
            };
            let Some((file, info)) = found else {
                missing.push(spec.name.clone());
                continue;
            };
            let wrong = |problem: String| MergeError::Tensor {
                file: files[*file].path.clone(),
                tensor: spec.name.clone(),
                problem,
            };
            if !info.shape.iter().map(|size| *size as i64).eq(shape.iter().copied()) {
                return Err(wrong(format!("is {:?}, and the configuration says {shape:?}", info.shape)));
            }
            let size = element_bytes(info.dtype).ok_or_else(|| wrong(format!("holds {:?}", info.dtype)))?;
            let start = files[*file].data_start + (info.data_offsets.0 + first * size) as u64;
            places.insert(spec.name.clone(), Place { file: *file, dtype: info.dtype, start });
        }
        if !missing.is_empty() {
            return Err(WeightFileError::Missing { place, tensors: missing }.into());
        }
        let stamps = files.iter().map(stamp).collect::<Result<_, _>>()?;
        Ok(Self {
            model: model.to_owned(),
            files,
            stamps,
            layout,
            adapters: ParameterLayout::new(trained),
            lora,
            places,
            digest: Mutex::default(),
        })
    }

    /// A received version, to be merged parameter by parameter.
    ///
    /// # Errors
    /// When it is not of this base, or a file cannot be read. The first version reads all of the base.
    pub(crate) fn version(&self, received: &Received) -> Result<Merged<'_>, MergeError> {
        self.check_unchanged()?;
        let description = received.whole.description();
        self.check(description)?;
        let kind = description.kind();
        let expected = (self.adapters.total() * kind_bytes(kind)) as u64;
        if description.bytes() != expected {
            return Err(MergeError::OtherSize { bytes: description.bytes(), expected });
        }
        let mut content = vec![0; self.adapters.total() * kind_bytes(kind)];
        let read = received.whole.file().read_exact_at(&mut content, 0);
        read.map_err(|source| MergeError::Io { what: "the received adapters".to_owned(), source })?;
        Ok(Merged { base: self, kind, adapters: numbers(&content, kind) })
    }

    /// Refuses a version of another base, and one that is applied in another way.
    fn check(&self, description: &Description) -> Result<(), MergeError> {
        let Some(found) = description.adapted() else {
            return Err(MergeError::OtherContent { found: "a whole model", expected: "adapters" });
        };
        let expected = self.lora.to_string();
        if found.settings != expected {
            return Err(MergeError::OtherAdapters { found: found.settings.clone(), expected });
        }
        let own = self.digest(description.kind())?;
        if found.base != own {
            let [found, expected] = [&found.base, &own].map(|digest| digits(&digest[..8]));
            return Err(MergeError::OtherBase { model: self.model.clone(), found, expected });
        }
        Ok(())
    }

    /// Digest of the base in this kind, as learners compute it: of all parameters in the order of their layout, with zeros between.
    fn digest(&self, kind: WeightKind) -> Result<Digest, MergeError> {
        let mut known = self.digest.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, digest)) = known.filter(|(of, _)| *of == kind) {
            return Ok(digest);
        }
        let element = kind_bytes(kind);
        let mut digest = BaseDigest::new(kind, (self.layout.total() * element) as u64);
        let mut end = 0;
        for spec in self.layout.parameters() {
            digest.update(&vec![0; (spec.offset - end) * element]);
            digest.update(&self.read(spec, kind)?);
            end = spec.offset + spec.numel();
        }
        digest.update(&vec![0; (self.layout.total() - end) * element]);
        let digest = digest.finish();
        *known = Some((kind, digest));
        Ok(digest)
    }

    /// The values of a parameter in this kind.
    fn read(&self, spec: &ParameterSpec, kind: WeightKind) -> Result<Vec<u8>, MergeError> {
        let Place { file, dtype, start } = self.places[&spec.name];
        let WeightFile { path, file, .. } = &self.files[file];
        let size = element_bytes(dtype).expect("other kinds were refused");
        let mut values = vec![0; spec.numel() * size];
        let read = file.read_exact_at(&mut values, start);
        read.map_err(|source| MergeError::Io { what: format!("`{}` of `{}`", spec.name, path.display()), source })?;
        Ok(converted(values, dtype, kind))
    }

    fn check_unchanged(&self) -> Result<(), MergeError> {
        for (file, known) in self.files.iter().zip(&self.stamps) {
            if stamp(file)? != *known {
                return Err(MergeError::Changed(file.path.clone()));
            }
        }
        Ok(())
    }
}

/// A version of adapters over its base.
#[derive(Debug)]
pub(crate) struct Merged<'a> {
    base: &'a Base,
    kind: WeightKind,
    /// In the order of their layout.
    adapters: Vec<f32>,
}

impl Merged<'_> {
    /// The values of a parameter of the base, with its adapter where it has one.
    ///
    /// # Errors
    /// When the base cannot be read.
    pub(crate) fn parameter(&self, spec: &ParameterSpec) -> Result<Vec<u8>, MergeError> {
        let mut values = self.base.read(spec, self.kind)?;
        let module = spec.name.strip_suffix(".weight").unwrap_or(&spec.name);
        let matrix = |matrix: char| {
            let found = self.base.adapters.find(&format!("{module}.lora_{matrix}.weight"))?;
            Some(&self.adapters[found.offset..found.offset + found.numel()])
        };
        if let (Some(a), Some(b)) = (matrix('A'), matrix('B')) {
            let adapter = Adapter { a, b, scale: self.base.lora.scale() as f32, rank: self.base.lora.rank as usize };
            adapter.merge_into(&mut values, self.kind, spec);
        }
        Ok(values)
    }
}

/// The adapter of a matrix `[M, N]`.
#[derive(Clone, Copy)]
struct Adapter<'a> {
    /// `[R, N]`.
    a: &'a [f32],
    /// `[M, R]`.
    b: &'a [f32],
    scale: f32,
    rank: usize,
}

impl Adapter<'_> {
    /// Adds itself to `values`, the whole matrix of `spec` in `kind`, on several threads.
    fn merge_into(&self, values: &mut [u8], kind: WeightKind, spec: &ParameterSpec) {
        let columns = self.a.len() / self.rank;
        let (rows, row_bytes) = (self.b.len() / self.rank, columns * kind_bytes(kind));
        let threads = std::thread::available_parallelism().map_or(1, usize::from).min(MOST_THREADS);
        let rows_each = rows.div_ceil(threads).max(1);
        std::thread::scope(|scope| {
            for (part, values) in values.chunks_mut(rows_each * row_bytes).enumerate() {
                let first = part * rows_each;
                scope.spawn(move || {
                    let mut sums = vec![0.0; columns];
                    for (row, values) in values.chunks_mut(row_bytes).enumerate() {
                        let row = first + row;
                        self.row(row, &mut sums);
                        add(values, &sums, kind, spec.offset + row * columns);
                    }
                });
            }
        });
    }

    /// A row of `scale B A`: `sums` is `[N]`.
    fn row(&self, row: usize, sums: &mut [f32]) {
        let columns = sums.len();
        let factors: Vec<f32> = self.b[row * self.rank..][..self.rank].iter().map(|b| b * self.scale).collect();
        for (block, sums) in sums.chunks_mut(BLOCK).enumerate() {
            let width = sums.len();
            let of = |k: usize| &self.a[k * columns + block * BLOCK..][..width];
            sums.fill(0.0);
            let (fours, rest) = factors.as_chunks::<4>();
            for (four, [f0, f1, f2, f3]) in fours.iter().enumerate() {
                let [a0, a1, a2, a3] = [0, 1, 2, 3].map(|k| of(4 * four + k));
                let rows = a0.iter().zip(a1).zip(a2).zip(a3);
                for (sum, (((a0, a1), a2), a3)) in sums.iter_mut().zip(rows) {
                    *sum += f0 * a0 + f1 * a1 + f2 * a2 + f3 * a3;
                }
            }
            for (k, factor) in rest.iter().enumerate() {
                let a = of(4 * fours.len() + k);
                sums.iter_mut().zip(a).for_each(|(sum, a)| *sum += factor * a);
            }
        }
    }
}

/// Adds `sums` to a row of values; `index` is the place of the row's first element in the layout, by which bfloat16 is rounded.
fn add(values: &mut [u8], sums: &[f32], kind: WeightKind, index: usize) {
    match kind {
        WeightKind::Float32 => {
            for (value, sum) in values.as_chunks_mut::<4>().0.iter_mut().zip(sums) {
                *value = (sum + f32::from_le_bytes(*value)).to_le_bytes();
            }
        }
        WeightKind::Bfloat16 => {
            for (place, (value, sum)) in values.as_chunks_mut::<2>().0.iter_mut().zip(sums).enumerate() {
                *value = rounded(sum + bf16::from_le_bytes(*value).to_f32(), index + place).to_le_bytes();
            }
        }
    }
}

/// Rounds away from zero when the part that is cut off exceeds the threshold of the element at `index`, as weights of full training are
/// rounded (`crates/torch/src/dither.rs`): at first an adapter adds less than half of the last bit of most weights, which rounding to the
/// nearest would lose.
fn rounded(value: f32, index: usize) -> u16 {
    // The low 32 bits of the index are the ones that count.
    let threshold = (index as u32).wrapping_mul(0x9e37_79b9) >> 16;
    (value.to_bits().wrapping_add(threshold) >> 16) as u16
}

/// Numbers of a kind in float32.
fn numbers(content: &[u8], kind: WeightKind) -> Vec<f32> {
    match kind {
        WeightKind::Float32 => content.as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect(),
        WeightKind::Bfloat16 => {
            content.as_chunks::<2>().0.iter().map(|bytes| bf16::from_le_bytes(*bytes).to_f32()).collect()
        }
    }
}

/// Values of a file in the kind of a version: 16-bit numbers are exact in float32, and others are rounded to the nearest.
fn converted(values: Vec<u8>, dtype: Dtype, kind: WeightKind) -> Vec<u8> {
    let halves = || values.as_chunks::<2>().0.iter();
    match (dtype, kind) {
        (Dtype::F16, WeightKind::Float32) => {
            halves().flat_map(|bytes| f16::from_le_bytes(*bytes).to_f32().to_le_bytes()).collect()
        }
        (Dtype::F16, WeightKind::Bfloat16) => {
            halves().flat_map(|bytes| bf16::from_f32(f16::from_le_bytes(*bytes).to_f32()).to_le_bytes()).collect()
        }
        (Dtype::BF16, WeightKind::Float32) => {
            halves().flat_map(|bytes| bf16::from_le_bytes(*bytes).to_f32().to_le_bytes()).collect()
        }
        (Dtype::F32, WeightKind::Bfloat16) => {
            let words = values.as_chunks::<4>().0.iter();
            words.flat_map(|bytes| bf16::from_f32(f32::from_le_bytes(*bytes)).to_le_bytes()).collect()
        }
        _ => values,
    }
}

/// Bytes of an element of the kinds that weights have in files.
fn element_bytes(dtype: Dtype) -> Option<usize> {
    match dtype {
        Dtype::F32 => Some(4),
        Dtype::F16 | Dtype::BF16 => Some(2),
        _ => None,
    }
}

fn kind_bytes(kind: WeightKind) -> usize {
    match kind {
        WeightKind::Float32 => 4,
        WeightKind::Bfloat16 => 2,
    }
}

fn stamp(file: &WeightFile) -> Result<Stamp, MergeError> {
    let metadata = file.file.metadata();
    let metadata = metadata.map_err(|source| MergeError::Io { what: format!("`{}`", file.path.display()), source })?;
    Ok(Stamp { bytes: metadata.len(), modified: (metadata.mtime(), metadata.mtime_nsec()) })
}

fn digits(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use std::fs;

    use pacs_weights::{Adapted, Fetched, HostStore, Transport, VersionId};

    use super::*;

    const RANK: usize = 5;

    fn golden(model: &str) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/models").join(model)
    }

    fn trained(model: &Path, rank: i64) -> ModelConfig {
        let config = ModelConfig::read(model).expect("a golden model");
        config.with_lora(&Lora { rank, alpha: 8.0, rslora: false, targets: Vec::new() }).expect("small")
    }

    fn received(store: &HostStore, adapted: Option<&Adapted>, content: &[u8]) -> Received {
        let (id, kind) = (VersionId::new(1, 1), WeightKind::Float32);
        let whole = match adapted {
            Some(adapted) => store.publish_adapters(id, kind, adapted, content),
            None => store.publish(id, kind, content),
        };
        Received { whole: whole.expect("room"), transport: Transport::Shared, fetched: Fetched::default() }
    }

    #[test]
    fn a_matrix_is_the_sum_of_its_base_and_its_adapter() {
        let place = tempfile::tempdir().expect("a folder");
        let store = HostStore::open_in("run", &[place.path().to_owned()]).expect("a store");
        let model = golden("qwen2-tied");
        let trained = trained(&model, RANK as i64);
        let base = Base::open(&model, &trained).expect("a model");
        let layout = ParameterLayout::new(&trained);
        let content: Vec<f32> = (0..layout.total()).map(|place| (place as f32 * 0.37).sin() * 0.1).collect();
        let bytes: Vec<u8> = content.iter().flat_map(|number| number.to_le_bytes()).collect();
        let digest = base.digest(WeightKind::Float32).expect("readable");
        let adapted = Adapted { base: digest, settings: trained.lora.as_ref().expect("adapters").to_string() };
        let received = received(&store, Some(&adapted), &bytes);
        let merged = base.version(&received).expect("its own");
        let (mut compared, mut untouched) = (0, 0);
        for spec in base.layout.parameters() {
            let before = numbers(&base.read(spec, WeightKind::Float32).expect("readable"), WeightKind::Float32);
            let after = numbers(&merged.parameter(spec).expect("readable"), WeightKind::Float32);
            let module = spec.name.strip_suffix(".weight").unwrap_or(&spec.name);
            let Some((a, b)) =
                layout.find(&format!("{module}.lora_A.weight")).zip(layout.find(&format!("{module}.lora_B.weight")))
            else {
                assert_eq!(before, after, "{}", spec.name);
                untouched += 1;
                continue;
            };
            let columns = spec.shape[1] as usize;
            for (index, (before, after)) in before.iter().zip(&after).enumerate() {
                let (row, column) = (index / columns, index % columns);
                let products = (0..RANK).map(|k| {
                    f64::from(content[b.offset + row * RANK + k]) * f64::from(content[a.offset + k * columns + column])
                });
                let expected = f64::from(*before) + 8.0 / RANK as f64 * products.sum::<f64>();
                let error = (f64::from(*after) - expected).abs();
                assert!(error < 1e-7 * (1.0 + expected.abs()), "{} at {index}: {after} {expected}", spec.name);
            }
            compared += 1;
        }
        assert!(compared == 7 * trained.layers && untouched > 0, "{compared} matrices, {untouched} others");
        // In 16 bits each weight is on the grid, next to its sum.
        let halves = Merged { kind: WeightKind::Bfloat16, adapters: content, base: &base };
        for spec in base.layout.parameters() {
            let exact = numbers(&merged.parameter(spec).expect("readable"), WeightKind::Float32);
            let found = numbers(&halves.parameter(spec).expect("readable"), WeightKind::Bfloat16);
            // Two roundings, of the base and of the sum, each by less than a step.
            let is_near = |(exact, found): (&f32, &f32)| (exact - found).abs() <= 2.0 * exact.abs().max(0.1) / 128.0;
            assert!(exact.iter().zip(&found).all(is_near), "{}", spec.name);
        }
    }

    #[test]
    fn what_does_not_belong_to_this_base_is_refused_by_name() {
        let place = tempfile::tempdir().expect("a folder");
        let store = HostStore::open_in("run", &[place.path().to_owned()]).expect("a store");
        let folder = place.path().join("model");
        fs::create_dir(&folder).expect("room");
        for file in ["config.json", "model.safetensors"] {
            fs::copy(golden("qwen2-tied").join(file), folder.join(file)).expect("copied");
        }
        let trained = trained(&folder, 4);
        let base = Base::open(&folder, &trained).expect("a model");
        let content = vec![0; 4 * ParameterLayout::new(&trained).total()];
        let own = Adapted {
            base: base.digest(WeightKind::Float32).expect("readable"),
            settings: trained.lora.as_ref().expect("adapters").to_string(),
        };
        let refused = |adapted: Option<&Adapted>, content: &[u8]| {
            let error = base.version(&received(&store, adapted, content)).expect_err("refused");
            (error.is_final(), error.to_string())
        };
        assert!(base.version(&received(&store, Some(&own), &content)).is_ok());
        let other = Adapted { base: [7; 32], ..own.clone() };
        let (is_final, error) = refused(Some(&other), &content);
        assert!(is_final && error.contains("0707070707070707…") && error.contains("/model`"), "{error}");
        let other = Adapted { settings: own.settings.replace("rank 4", "rank 8"), ..own.clone() };
        let (is_final, error) = refused(Some(&other), &content);
        assert!(is_final && error.contains("rank 8") && error.contains("rank 4"), "{error}");
        let (is_final, error) = refused(None, &content);
        assert!(is_final && error.starts_with("a whole model was published"), "{error}");
        let (is_final, error) = refused(Some(&own), &content[4..]);
        assert!(!is_final && error.contains("do not fit"), "{error}");
        // The run has begun with other weights than there are now.
        let weights = folder.join("model.safetensors");
        let mut bytes = fs::read(&weights).expect("readable");
        *bytes.last_mut().expect("a weight") ^= 1;
        fs::write(&weights, bytes).expect("written");
        fs::File::options()
            .append(true)
            .open(&weights)
            .and_then(|file| file.set_modified(std::time::SystemTime::UNIX_EPOCH))
            .expect("another time, however coarse the clock is");
        let (is_final, error) = refused(Some(&own), &content);
        assert!(is_final && error.contains("has changed"), "{error}");
    }

    #[test]
    fn files_of_other_kinds_are_read_as_the_learner_reads_them() {
        let numbers = [1.0_f32, -0.333, 3.0e-5, 65504.0];
        let halves: Vec<u8> = numbers.iter().flat_map(|number| f16::from_f32(*number).to_le_bytes()).collect();
        let exact = converted(halves.clone(), Dtype::F16, WeightKind::Float32);
        let of_file: Vec<f32> = numbers.iter().map(|number| f16::from_f32(*number).to_f32()).collect();
        assert_eq!(super::numbers(&exact, WeightKind::Float32), of_file);
        let nearest: Vec<f32> = of_file.iter().map(|number| bf16::from_f32(*number).to_f32()).collect();
        for (values, dtype) in [(halves, Dtype::F16), (exact, Dtype::F32)] {
            let found = converted(values, dtype, WeightKind::Bfloat16);
            assert_eq!(super::numbers(&found, WeightKind::Bfloat16), nearest);
            let back = converted(found, Dtype::BF16, WeightKind::Float32);
            assert_eq!(super::numbers(&back, WeightKind::Float32), nearest);
        }
    }
}
