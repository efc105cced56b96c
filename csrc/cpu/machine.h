// Which levels a machine supports: what the machine says in raw words, and what follows from them.

#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace fastvit::cpu {

// Registers after CPUID (leaf 7 has subleaves 0 and 1; absent leaves are zero) and XGETBV (0).
struct X86Words {
  uint32_t leaf1_ecx, leaf7_ebx, leaf7_ecx, leaf7_edx, leaf7_1_eax;
  uint64_t xcr0;
  uint32_t leaf0_ebx;  // the first letters of the vendor
};

// AT_HWCAP and AT_HWCAP2 of Linux on arm64.
struct Arm64Words {
  uint64_t hwcap, hwcap2;
};

// The names of all levels whose instructions these words promise, from the plainest to the best. A
// level need not include the one before it: avx512 does not imply avx_vnni.
std::vector<std::string> levels(const X86Words& words);
std::vector<std::string> levels(const Arm64Words& words);

// The same of this machine.
std::vector<std::string> machine_levels();

// Asks the kernel for the tile registers of AMX, which are 8 KiB more to save per thread: until a
// process has asked, using them is a fault. Once per process; false where they are not given.
bool tile_registers_granted();

}  // namespace fastvit::cpu
