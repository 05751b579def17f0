//! What CUDA knows of tensor types: one row for each that has kernels. `kernels/types` is the device's side of it.

use anyhow::{Context, Result};

use crate::quant::TensorType;

/// Values of a row that one lane of a kernel reads.
pub const UNIT: usize = 64;

/// Units of a whole tile's rows.
const SLICE_UNITS: usize = 32;

/// The type that prompts multiply in place of a type without a GEMM kernel.
pub const COPY_TYPE: TensorType = TensorType::F16;

/// How kernels know a tensor type, and how its matrices lie in device memory.
pub struct KernelType {
    pub tensor_type: TensorType,
    /// ggml's number, which tells types apart where one kernel reads all.
    pub id: i32,
    /// In the names of the kernels for this type alone.
    pub name: &'static str,
    storage: Storage,
    pub gemm: Gemm,
}

/// How a matrix lies in device memory.
enum Storage {
    /// Rows one after another, each rounded up to 16 bytes.
    Rows { value_bytes: usize },
    /// Tiles of two rows by up to 32 units, each rounded up to 16 bytes.
    Tiles { two_unit_bytes: usize },
}

/// How prompts multiply with a matrix.
pub enum Gemm {
    /// As it is, weights being copied in runs. Wide: where a warp multiplies 32 rows instead of 16.
    Direct { narrow: Run, wide: Run },
    /// After a copy of it as [`COPY_TYPE`].
    Copied,
}

/// What a warp of a GEMM copies at a time: the type's `Run<MT>` of `kernels/types`, `MT` being 2 for wide runs, else 1.
#[derive(Clone, Copy)]
pub struct Run {
    /// Of a row.
    pub values: usize,
    /// Of 16 rows.
    pub bytes: usize,
}

const fn row(
    tensor_type: TensorType,
    id: i32,
    name: &'static str,
    storage: Storage,
    gemm: Gemm,
) -> KernelType {
    KernelType {
        tensor_type,
        id,
        name,
        storage,
        gemm,
    }
}

const fn rows(value_bytes: usize) -> Storage {
    Storage::Rows { value_bytes }
}

const fn tiles(two_unit_bytes: usize) -> Storage {
    Storage::Tiles { two_unit_bytes }
}

/// Values and bytes of a narrow run, then of a wide one.
const fn direct(values: usize, bytes: usize, wide_values: usize, wide_bytes: usize) -> Gemm {
    Gemm::Direct {
        narrow: Run { values, bytes },
        wide: Run {
            values: wide_values,
            bytes: wide_bytes,
        },
    }
}

/// The table: everything that a new type takes on the host.
static KERNEL_TYPES: [KernelType; 19] = {
    use Gemm::Copied;
    use TensorType::*;
    [
        row(F32, 0, "f32", rows(4), Copied),
        row(BF16, 30, "bf16", rows(2), Copied),
        row(F16, 1, "f16", rows(2), direct(128, 4096, 128, 4096)),
        row(Q4_0, 2, "q4_0", tiles(72), direct(512, 4608, 256, 2304)),
        row(Q4_1, 3, "q4_1", tiles(80), direct(512, 5120, 256, 2560)),
        row(Q5_0, 6, "q5_0", tiles(88), direct(256, 2816, 256, 2816)),
        row(Q5_1, 7, "q5_1", tiles(96), direct(256, 3072, 256, 3072)),
        row(Q8_0, 8, "q8_0", tiles(136), direct(256, 4352, 256, 4352)),
        row(Q2_K, 10, "q2_k", tiles(42), direct(512, 2688, 512, 2688)),
        row(Q3_K, 11, "q3_k", tiles(56), direct(512, 3584, 512, 3584)),
        row(Q4_K, 12, "q4_k", tiles(72), direct(512, 4608, 256, 2304)),
        row(Q5_K, 13, "q5_k", tiles(88), direct(256, 2816, 256, 2816)),
        row(Q6_K, 14, "q6_k", tiles(105), direct(256, 3392, 256, 3392)),
        row(
            IQ4_NL,
            20,
            "iq4_nl",
            tiles(72),
            direct(512, 4608, 256, 2304),
        ),
        row(
            IQ4_XS,
            23,
            "iq4_xs",
            tiles(68),
            direct(512, 4352, 256, 2176),
        ),
        row(MXFP4, 39, "mxfp4", tiles(68), direct(512, 4608, 256, 2304)),
        row(IQ3_S, 21, "iq3_s", tiles(68), direct(512, 4352, 256, 2176)),
        row(
            IQ3_XXS,
            18,
            "iq3_xxs",
            tiles(68),
            direct(512, 4352, 256, 2176),
        ),
        row(IQ2_S, 22, "iq2_s", tiles(53), direct(512, 3712, 512, 3712)),
    ]
};

impl KernelType {
    /// The row of `tensor_type`.
    ///
    /// # Errors
    /// Where it has no kernels.
    pub fn of(tensor_type: TensorType) -> Result<&'static Self> {
        KERNEL_TYPES
            .iter()
            .find(|row| row.tensor_type == tensor_type)
            .with_context(|| {
                format!(
                    "{} weights have no CUDA kernels: use --device cpu, or a file with other types",
                    tensor_type.name()
                )
            })
    }

    /// The file of `kernels` with a GEMV for matrices of these types, and what its entry points' names begin with: the
    /// fewer types a kernel tells apart, the faster it is.
    pub fn gemv_kernels(types: &[TensorType]) -> Result<(&'static str, String)> {
        use TensorType::*;
        let frequent = |tensor_type: &TensorType| {
            matches!(
                tensor_type,
                F32 | F16 | BF16 | Q4_0 | Q4_1 | Q5_0 | Q5_1 | Q8_0 | Q4_K | Q5_K | Q6_K
            )
        };
        let float = |tensor_type: &TensorType| matches!(tensor_type, F32 | F16 | BF16);
        let one = types.iter().all(|tensor_type| *tensor_type == types[0]);
        Ok(if one && !float(&types[0]) {
            ("gemv_one", format!("gemv_{}", Self::of(types[0])?.name))
        } else if types.iter().all(frequent) {
            ("gemv", "gemv".to_owned())
        } else {
            ("gemv_any", "gemv_any".to_owned())
        })
    }

    /// Bytes of a matrix in device memory.
    pub fn matrix_bytes(&self, rows: usize, columns: usize) -> usize {
        match self.storage {
            Storage::Rows { .. } => rows * self.pair_bytes(columns) / 2,
            Storage::Tiles { .. } => rows.div_ceil(2) * self.pair_bytes(columns),
        }
    }

    /// Bytes of two of its rows.
    pub fn pair_bytes(&self, columns: usize) -> usize {
        match self.storage {
            Storage::Rows { value_bytes } => 2 * (columns * value_bytes).next_multiple_of(16),
            Storage::Tiles { two_unit_bytes } => {
                let units = columns.div_ceil(UNIT);
                let tile = |units: usize| (units * two_unit_bytes).next_multiple_of(16);
                units / SLICE_UNITS * tile(SLICE_UNITS) + tile(units % SLICE_UNITS)
            }
        }
    }

    /// Bytes of the first tile of a row pair; `None` where there are no tiles.
    pub fn tile_bytes(&self, columns: usize) -> Option<usize> {
        match self.storage {
            Storage::Rows { .. } => None,
            Storage::Tiles { .. } => Some(self.pair_bytes(columns.min(SLICE_UNITS * UNIT))),
        }
    }

    /// Threads of the kernel `repack` that share a row.
    pub fn repack_threads_per_row(&self, columns: usize) -> usize {
        match self.storage {
            Storage::Rows { .. } => columns,
            Storage::Tiles { .. } => columns.div_ceil(UNIT),
        }
    }

    /// Whether prompts need a copy of a matrix as [`COPY_TYPE`].
    pub fn needs_copy(&self) -> bool {
        matches!(self.gemm, Gemm::Copied)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_ggmls() {
        for row in &KERNEL_TYPES {
            let named = TensorType::from_ggml_id(row.id as u32);
            assert_eq!(named, Some(row.tensor_type), "{}", row.name);
        }
    }

    #[test]
    fn copies_are_multiplied_directly() {
        let row = KernelType::of(COPY_TYPE).expect("the type has kernels");
        assert!(!row.needs_copy());
    }
}
